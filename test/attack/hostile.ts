/**
 * Hostile input by a seed: valid token requests and API calls, the ways to bend them, and what may
 * come of it. hostile.test.ts sends some of it, soak.ts sends much of it.
 */

import { createPrivateKey, createPublicKey, sign, verify } from "node:crypto";
import * as jose from "jose";
import type { ClientRegistration } from "../../config.ts";
import { form as formType } from "../support/http.ts";
import { assertionType, key, secondsNow as now } from "../support/jwt.ts";

const sha256 = (text: string, encoding: "base64" | "base64url") =>
  new Bun.CryptoHasher("sha256").update(text).digest(encoding);

// --- Chance --------------------------------------------------------------------------------------

/** Numbers that look random and are the same for the same seed and index (mulberry32). */
export class Chance {
  #state: number;

  constructor(seed: number, index = 0) {
    this.#state = (seed ^ Math.imul(index + 1, 0x9e3779b1)) >>> 0;
  }

  below = (limit: number): number => {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };

  once = (inHowMany: number) => this.below(inHowMany) === 0;
  pick = <Value>(list: readonly Value[]): Value => list[this.below(list.length)]!;
  bytes = (length: number) => Buffer.from(Array.from({ length }, () => this.below(256)));
  word = (length = 12) => this.bytes(length).toString("base64url").slice(0, length);

  /** A text with one to three small changes, never with a line break. */
  mutate(text: string): string {
    let mutated = text;
    for (let changes = 1 + this.below(3); changes > 0; changes--) {
      const at = this.below(mutated.length + 1);
      const [before, rest] = [mutated.slice(0, at), mutated.slice(at)];
      const unit = String.fromCharCode(this.below(256)).replace(/[\r\n]/, "\t");
      const [added, changed, removed] = [unit + rest, unit + rest.slice(1), rest.slice(1)];
      const others = [added, changed, removed, "", rest.slice(0, 20) + rest, swapCase(rest)];
      mutated = before + this.pick(others);
    }
    return mutated;
  }
}

const swapCase = (text: string) =>
  text.replace(/[a-z]/gi, (letter) => (letter < "a" ? letter.toLowerCase() : letter.toUpperCase()));

// --- A connection that sends anything ------------------------------------------------------------

/** Status 0: the server hung up without an answer. Status -1: none came in time. */
export interface RawAnswer {
  status: number;
  headers: Map<string, string>;
  body: string;
}

const noAnswer = (status: number): RawAnswer => ({ status, headers: new Map(), body: "" });

/** HTTP/1.1 by hand over one socket: what is sent need not make sense. */
export class Connection {
  isClosed = false;
  #received = "";
  #unsent = Buffer.alloc(0);
  #waiting: ((answer: RawAnswer) => void)[] = [];
  #socket!: Bun.Socket;

  static async open(url: string): Promise<Connection> {
    const connection = new Connection();
    const { hostname, port } = new URL(url);
    const socket = {
      data: (_socket: unknown, chunk: Buffer) => connection.#take(chunk),
      drain: () => connection.write(""),
      close: () => connection.#end(),
      error: () => connection.#end(),
    };
    connection.#socket = await Bun.connect({ hostname, port: Number(port), socket });
    return connection;
  }

  write(bytes: string | Buffer): void {
    this.#unsent = Buffer.concat([this.#unsent, Buffer.from(bytes as string, "latin1")]);
    if (this.isClosed || this.#unsent.length === 0) return;
    this.#unsent = this.#unsent.subarray(Math.max(0, this.#socket.write(this.#unsent)));
  }

  /** Sends a request, and waits for its answer. */
  async send(bytes: string | Buffer, seconds = 20): Promise<RawAnswer> {
    const answer = this.next(seconds);
    this.write(bytes);
    return await answer;
  }

  /** The next answer that nobody waits for yet. */
  async next(seconds = 20): Promise<RawAnswer> {
    const { promise, resolve } = Promise.withResolvers<RawAnswer>();
    const timer = setTimeout(() => resolve(noAnswer(-1)), seconds * 1000);
    this.#waiting.push(resolve);
    if (this.isClosed) this.#end();
    return await promise.finally(() => clearTimeout(timer));
  }

  close(): void {
    this.#socket.terminate();
  }

  #take(chunk: Buffer): void {
    this.#received += chunk.toString("latin1");
    while (this.#waiting[0] && this.#received.includes("\r\n\r\n")) {
      const [head = ""] = this.#received.split("\r\n\r\n", 1);
      const status = Number(/^HTTP\/1\.1 (\d{3})/.exec(head)?.[1] ?? 999);
      const fields = head.matchAll(/\r\n([^:\r]*): *([^\r]*)/g);
      const headers = new Map([...fields].map(([, name, value]) => [name!.toLowerCase(), value!]));
      const length = Number(headers.get("content-length") ?? 0);
      const end = head.length + 4 + length;
      if (this.#received.length < end) return;
      const body = this.#received.slice(end - length, end);
      this.#received = this.#received.slice(end);
      if (status >= 200) this.#waiting.shift()!({ status, headers, body });
    }
  }

  #end(): void {
    this.isClosed = true;
    for (const resolve of this.#waiting.splice(0)) resolve(noAnswer(0));
  }
}

/** One request on a connection of its own. Status 0 if nobody listens. */
export async function once(url: string, request: string, seconds = 20): Promise<RawAnswer> {
  const connection = await Connection.open(url).catch(() => undefined);
  if (!connection) return noAnswer(0);
  return await connection.send(request, seconds).finally(() => connection.close());
}

export const repeat = <Value>(count: number, make: (index: number) => Value) =>
  Array.from({ length: count }, (_value, index) => make(index));

// --- Parties -------------------------------------------------------------------------------------

/** A key pair, also in the form that signs without a promise. */
export async function signerNamed(kid: string) {
  const pair = await key("ES256", kid);
  const { kid: _kid, alg: _alg, ...jwk } = pair.publicJwk;
  return { ...pair, jwk, signingKey: createPrivateKey({ key: pair.privateJwk, format: "jwk" }) };
}
export type Signer = Awaited<ReturnType<typeof signerNamed>>;

const app = await signerNamed("app");
const prover = await signerNamed("proof");
const stranger = await signerNamed("app");
const jkt = await jose.calculateJwkThumbprint(prover.jwk);

const secrets = new Map([
  ["client", "secret"],
  ["bound", "a secret of the bound client"],
  ["öd d:client%1", "s%e c+r&t=:é\u{1f4a9}"],
]);

/** The registrations that the token requests are for. */
export function hostileClients(resource: string) {
  const registration = (client_id: string): ClientRegistration => ({
    client_id,
    client_secrets: [{ sha256: sha256(secrets.get(client_id) ?? crypto.randomUUID(), "base64") }],
    grant_types: ["client_credentials"],
    scope: "api1 read",
    access_token_lifetime_seconds: 3600,
  });
  const clients = [
    ...["client", "öd d:client%1"].map(registration),
    { ...registration("bound"), dpop_bound_access_tokens: true },
    { ...registration("app"), jwks: { keys: [app.publicJwk] } },
  ];
  const scopes = ["api1", "read"].map((scope) => ({ scope, description: scope, resource }));
  return { clients, scopes };
}

/** What is in this output of a program although it is nobody's business: secrets, JWTs, keys. */
export function leaksIn(output: string): string[] {
  const patterns = [/eyJ[\w-]{8,}/, /"d"\s*:\s*"/, /PRIVATE KEY/];
  const words = [...secrets.values(), app.privateJwk.d!, prover.privateJwk.d!];
  const confidential = [...words, btoa("client:secret")].filter((word) => word !== "secret");
  const found = patterns.flatMap((pattern) => pattern.exec(output)?.[0] ?? []);
  return [...found, ...confidential.filter((word) => output.includes(word))];
}

// --- JWTs ----------------------------------------------------------------------------------------

type Members = Record<string, unknown>;

/** A JWT before it is signed. Texts stand for the JSON; `finish` bends the signed segments. */
export interface Jwt {
  header: Members;
  claims: Members;
  key: Signer["signingKey"];
  headerText?: string;
  claimsText?: string;
  finish?: (header: string, claims: string, signature: string) => string;
}

export function encode({ header, claims, key, headerText, claimsText, finish }: Jwt): string {
  const texts = [headerText ?? JSON.stringify(header), claimsText ?? JSON.stringify(claims)];
  const [head = "", body = ""] = texts.map((text) => Buffer.from(text).toString("base64url"));
  const signature = signatureOf(`${head}.${body}`, key);
  return finish ? finish(head, body, signature) : `${head}.${body}.${signature}`;
}

const signatureOf = (input: string, key: Signer["signingKey"]) =>
  sign("sha256", Buffer.from(input), { key, dsaEncoding: "ieee-p1363" }).toString("base64url");

/** Whether a JWT is signed with the key: worked out here, not by the code under test. */
function isSigned(jwt: string, { jwk }: Signer): boolean {
  const [header, claims, signature = ""] = jwt.split(".");
  const key = createPublicKey({ key: jwk, format: "jwk" });
  const options = { key, dsaEncoding: "ieee-p1363" } as const;
  const bytes = Buffer.from(signature, "base64url");
  return verify("sha256", Buffer.from(`${header}.${claims}`), options, bytes);
}

/** Whom the requests are for. With a signer they are API calls, else token requests. */
export interface Target {
  issuer: string;
  resource: string;
  signer?: Signer;
}

/** A token that is good at the API for ten minutes, as it is or bound to the key of the proofs. */
export function tokenFor(at: Target, client_id: string, isBound = false): Jwt {
  const header = { alg: "ES256", kid: at.signer!.publicJwk.kid, typ: "at+jwt" };
  const ids = { iss: at.issuer, aud: at.resource, sub: client_id, client_id, scope: "api1" };
  const times = { iat: now(), exp: now() + 600, jti: crypto.randomUUID() };
  const claims = { ...ids, ...times, ...(isBound && { cnf: { jkt } }) };
  return { header, claims, key: at.signer!.signingKey };
}

export function proofFor(htm: string, htu: string, token?: string): Jwt {
  const ath = token && { ath: sha256(token, "base64url") };
  const claims = { htm, htu, iat: now(), jti: crypto.randomUUID(), ...ath };
  const header = { alg: "ES256", typ: "dpop+jwt", jwk: prover.jwk };
  return { header, claims, key: prover.signingKey };
}

export function assertionFor(issuer: string): Jwt {
  const ids = { iss: "app", sub: "app", aud: issuer, jti: crypto.randomUUID() };
  const header = { alg: "ES256", kid: "app", typ: "JWT" };
  return { header, claims: { ...ids, exp: now() + 60 }, key: app.signingKey };
}

// --- Plain requests ------------------------------------------------------------------------------

const head = (...lines: string[]) => `${lines.join("\r\n")}\r\n\r\n`;

/** A token request with the secret of "client", and further header fields. */
export function tokenRequest(secret = "secret", ...fields: string[]): string {
  const body = "grant_type=client_credentials&scope=api1";
  const basic = `Authorization: Basic ${btoa(`client:${secret}`)}`;
  const line = ["POST /connect/token HTTP/1.1", "Host: x", `Content-Length: ${body.length}`];
  return head(...line, `Content-Type: ${formType}`, basic, ...fields) + body;
}

export const provenTokenRequest = (issuer: string) =>
  tokenRequest("secret", `DPoP: ${encode(proofFor("POST", `${issuer}/connect/token`))}`);

/** An API call, and further header fields. */
export const callRequest = (token: string, scheme = "Bearer", ...fields: string[]) =>
  head("GET /identity HTTP/1.1", "Host: x", `Authorization: ${scheme} ${token}`, ...fields);

export const provenCallRequest = (resource: string, token: string) =>
  callRequest(token, "DPoP", `DPoP: ${encode(proofFor("GET", `${resource}/identity`, token))}`);

// --- Bends of JWTs -------------------------------------------------------------------------------

/** ok: must succeed. refused: must not. either: may, if the credentials in it are still good. */
type Outcome = "ok" | "either" | "refused";
/** Ways to change something, by outcome and name. */
type Bends<Subject> = {
  [may in Outcome]?: Record<string, (subject: Subject, chance: Chance) => unknown>;
};

const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);
const deepened = (members: Members, depth: number) =>
  `${JSON.stringify(members).slice(0, -1)},"deep":${nested(depth)}}`;

/** No text that says something, no text at all, and what no member that is checked may be. */
const oddTexts = [" ", "__proto__", "\0", "\ud800", "x".repeat(2_000)];
const noText = [null, "", true, [], ["x"], [[]], {}, { toString: 1 }];
const junk = [...noText, ...oddTexts];
const junkTexts = ["", "null", "[]", "1", '"x"', "{", "{}{}", "{'a':1}", "\0", nested(3_000)];
/** These may be any text. */
const freeTexts = ["sub", "client_id", "jti"];

/** The same JWT with one member wrong, in each way. */
export function wrongMembers(jwt: Jwt): Jwt[] {
  const ofPart = (part: "header" | "claims", added: string) =>
    [...Object.keys(jwt[part]), added].flatMap((name) => {
      const others = name === "kid" ? oddTexts : [...junk, [[jwt[part][name]]]];
      const values = freeTexts.includes(name) ? noText : others;
      return values.map((value) => ({ ...jwt, [part]: { ...jwt[part], [name]: value } }));
    });
  return [...ofPart("header", "crit"), ...ofPart("claims", "nbf")];
}

const ofJwt: Bends<Jwt> = {
  ok: {
    "unknown members": ({ header, claims }, { word }) => {
      header[word(8)] = "\ud800\0";
      claims[word(8)] = [null, { deep: [word()] }];
    },
    "a long jti": ({ claims }, { word }) => (claims["jti"] = word(3_000)),
  },
  either: {
    "deep claims": (jwt, { below }) => (jwt.claimsText = deepened(jwt.claims, below(4_500))),
    "a deep header": (jwt, { below }) => (jwt.headerText = deepened(jwt.header, below(4_500))),
    "members twice": (jwt) =>
      (jwt.headerText = `{"alg":"none","kid":"other",${JSON.stringify(jwt.header).slice(1)}`),
    "a JWT changed": (jwt, chance) => (jwt.finish = (...parts) => chance.mutate(parts.join("."))),
    "aud in a list": ({ claims }) => (claims["aud"] &&= [claims["aud"]]),
  },
  refused: {
    "a wrong member": (jwt, { pick }) => Object.assign(jwt, pick(wrongMembers(jwt))),
    "signed by a stranger": (jwt) => {
      jwt.key = stranger.signingKey;
      Object.assign(jwt.header, { jku: "https://127.0.0.1:1/", x5u: "https://127.0.0.1:1/" });
      jwt.header["jwk"] ??= stranger.jwk;
    },
    "alg none": (jwt, { pick }) => {
      jwt.header["alg"] = pick(["none", "None", "NONE"]);
      jwt.finish = (a, b) => `${a}.${b}.`;
    },
    "another signature": (jwt, { bytes, pick }) => {
      const random = bytes(pick([1, 63, 64, 65, 256])).toString("base64url");
      const others = ["", "A".repeat(86), random, signatureOf("a.b", jwt.key)];
      jwt.finish = (a, b, old) => `${a}.${b}.${pick([...others, old.slice(0, -4), `${old}AAAA`])}`;
    },
    "another form": (jwt, { pick, word }) =>
      (jwt.finish = (a, b, c) => {
        const inJson = JSON.stringify({ protected: a, payload: b, signature: c });
        const others = [inJson, `${a}.${b}`, `${b}.${c}`, `.${a}.${b}.${c}`, `${a}.${b}.${c}.`];
        return pick([...others, ".", "..", "a.b.c", "e30.e30.", nested(50), word(90)]);
      }),
    "claims that are no object": (jwt, { pick }) => (jwt.claimsText = pick(junkTexts)),
    "a header that is no object": (jwt, { pick }) => (jwt.headerText = pick(junkTexts)),
  },
};

// --- Bends of HTTP requests ----------------------------------------------------------------------

type Pairs = [name: string, value: string][];
const formEncode = (text: string) => new URLSearchParams([["", text]]).toString().slice(1);

/** Replaces all of a name, in whatever case. */
function set(pairs: Pairs, name: string, ...values: string[]): void {
  const others = pairs.filter((pair) => pair[0].toLowerCase() !== name.toLowerCase());
  pairs.splice(0, pairs.length, ...others, ...values.map((value): Pairs[0] => [name, value]));
}

function mutateOne(pairs: Pairs, chance: Chance): void {
  const [pair, which] = [chance.pick(pairs), chance.below(2)];
  pair[which] = chance.mutate(pair[which]!);
}

/** These change nothing that counts. */
const harmless: ((request: Hostile, chance: Chance) => unknown)[] = [
  ({ headers }) => headers.reverse(),
  ({ form }) => form.reverse(),
  ({ headers }) => headers.forEach((pair) => (pair[0] = swapCase(pair[0]))),
  ({ headers }, { word }) => headers.push(["X-Forwarded-Host", "x"], [`X-${word(9)}`, "\xff;,="]),
  ({ headers }) => headers.push(["Expect", "100-continue"]),
  ({ headers }, { pick }) => set(headers, "Host", pick(["evil.example", "[::1]:1", "a_b"])),
  (request, { word }) => (request.target += `?${word()}=%zz&grant_type=x`),
  (request) => (request.target = request.target.replace(/^\//, "http://evil.example/")),
];

const methods = ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "get", "post", "GET\0"];
const oddFields = [
  ...["a\0b", "a\r\n b", "a\r\nX y: z", "a\nAuthorization: Basic eDp5", "x".repeat(20_000)],
  ...["a\r\nContent-Length: 1", "a\r\nTransfer-Encoding: chunked", "y\r\nX: ".repeat(300)],
];

const ofRequest: Bends<Hostile> = {
  either: {
    "a header changed": ({ headers }, chance) => mutateOne(headers, chance),
    "the target changed": (request, chance) => (request.target = chance.mutate(request.target)),
  },
  refused: {
    "another path": (request, { pick, word }) => {
      const [path = ""] = /\/connect\/token|\/identity/.exec(request.target) ?? [];
      const near = [`${path}/`, `/${path}`, `${path}%00`, swapCase(path), `${path};x`, `/x${path}`];
      const other = pick([...near, "*", "/", "/%", "/__proto__", `/${word(3_000)}`]);
      request.target = request.target.replace(path, () => other);
    },
    "another method": (request, { pick }) =>
      (request.method = pick([...methods, request.method === "POST" ? "GET" : "POST"])),
    "Authorization twice": ({ headers }, { pick }) =>
      headers.push(
        ["Authorization", "Basic eDp5"],
        ["Authorization", pick(["Bearer x", "DPoP x"])],
      ),
    "no Host": ({ headers }) => set(headers, "Host"),
    "an odd field": ({ headers }, { pick }) => headers.push(["X", pick(oddFields)]),
  },
};

const malformed = ["%", "%4", "%zz", "%00", "%ff", "%c3%28", "%c0%af", "%ed%a0%80", "\0", "\xff"];
const ofForm: Bends<Hostile> = {
  ok: {
    "unknown parameters": ({ form }, { word }) =>
      form.push(["__proto__", word()], ["constructor", ""], ["", ""], ["a", "1"], ["a", "2"]),
  },
  either: { "a parameter changed": ({ form }, chance) => mutateOne(form, chance) },
  refused: {
    "more than 16 KiB": ({ form }) => form.push(["a", "x".repeat(16_384)]),
    "a parameter twice": ({ form }, { pick, word }) => {
      const [name, value] = pick(form);
      form.push([name, name === "resource" ? value : pick([value, "", word()])]);
    },
    "malformed encoding": ({ form }, { below, pick }) => (pick(form)[below(2)] += pick(malformed)),
  },
};

// --- From a seed to a request --------------------------------------------------------------------

/** A request that is bent in one part of it, and what is known of it. Its texts are bytes. */
export class Hostile {
  readonly at: Target;
  readonly client_id: string;
  readonly isBound: boolean;
  method = "GET";
  target = "/identity";
  readonly headers: Pairs = [["Host", "x"]];
  /** Name and value of each parameter, encoded. */
  readonly form: Pairs = [];
  may: Outcome = "ok";
  name = "none";
  readonly #chance: Chance;

  /** The request of this seed and index. */
  constructor(at: Target, seed: number, index: number) {
    const chance = new Chance(seed, index);
    this.at = at;
    this.#chance = chance;
    this.client_id = at.signer ? chance.word() : chance.pick([...secrets.keys(), "app"]);
    this.isBound = this.client_id === "bound" || chance.once(3);
    if (at.signer) this.#makeCall();
    else this.#makeTokenRequest();
    for (let count = chance.below(3); count > 0; count--) chance.pick(harmless)(this, chance);
    if (chance.once(3)) this.#bend(this, ofRequest, at.signer ? {} : ofForm);
  }

  #makeCall(): void {
    const token = this.#encode(tokenFor(this.at, this.client_id, this.isBound));
    set(this.headers, "Authorization", `${this.isBound ? "DPoP" : "Bearer"} ${token}`);
    const proof = proofFor("GET", `${this.at.resource}/identity`, token);
    if (this.isBound) set(this.headers, "DPoP", this.#encode(proof));
  }

  #makeTokenRequest(): void {
    const { at, client_id, headers, form } = this;
    Object.assign(this, { method: "POST", target: "/connect/token" });
    set(headers, "Content-Type", formType);
    set(form, "grant_type", "client_credentials");
    if (this.#chance.once(2)) set(form, "scope", "api1");
    if (this.#chance.once(4)) set(form, "resource", formEncode(at.resource));
    if (client_id === "app") {
      set(form, "client_assertion_type", formEncode(assertionType));
      set(form, "client_assertion", this.#encode(assertionFor(at.issuer)));
    } else {
      const [id = "", secret = ""] = [client_id, this.#secret()].map(formEncode);
      if (this.#chance.once(2)) headers.push(["Authorization", `Basic ${btoa(`${id}:${secret}`)}`]);
      else form.push(["client_id", id], ["client_secret", secret]);
    }
    const proof = proofFor("POST", `${at.issuer}/connect/token`);
    if (this.isBound) set(headers, "DPoP", this.#encode(proof));
  }

  /** The secret of the client, or one that is almost it. */
  #secret(): string {
    const secret = secrets.get(this.client_id) ?? "";
    if (this.#chance.once(3)) Object.assign(this, { may: "either", name: "another secret" });
    return this.name === "none" ? secret : this.#chance.mutate(secret);
  }

  #encode(jwt: Jwt): string {
    if (this.#chance.once(3)) this.#bend(jwt, ofJwt);
    return encode(jwt);
  }

  /** Bends something, if nothing was bent yet. */
  #bend<Subject>(subject: Subject, ...lists: Bends<Subject>[]): void {
    if (this.name !== "none") return;
    const named = lists.flatMap((bends) => Object.entries(bends));
    const choices = named.flatMap(([may, bends]) =>
      Object.entries(bends).map(([name, bend]) => ({ may, name, bend })),
    );
    const { may, name, bend } = this.#chance.pick(choices);
    Object.assign(this, { may, name });
    bend(subject, this.#chance);
  }

  get text(): string {
    return this.form.map((pair) => pair.join("=")).join("&");
  }

  get bytes(): Buffer {
    const line = `${this.method} ${this.target} HTTP/1.1`;
    const fields = this.headers.map((pair) => pair.join(": "));
    const length = `Content-Length: ${this.text.length}`;
    return Buffer.from(head(line, ...fields, length) + this.text, "latin1");
  }

  // --- What may come back ------------------------------------------------------------------------

  /** What is wrong with an answer, if anything. */
  problemOf({ status, body }: RawAnswer, isAgain: boolean): string | false {
    const isUsedUp = isAgain && (this.#fields("dpop").length > 0 || this.client_id === "app");
    const may = isUsedUp ? "refused" : this.may;
    if (status === -1) return "no answer";
    // Bun itself hangs up on a method that it does not know, and says 505 to a bad first line.
    const isKnown = /^(GET|POST|PUT|DELETE|PATCH|OPTIONS|TRACE)$/.test(this.method);
    if (status === 0) return isKnown && "hung up without an answer";
    if (status === 505) return (body || may === "ok") && "status 505";
    if (status === 200 && may === "refused") return "accepted";
    if (status === 200)
      return this.at.signer ? this.#problemOfCall(body) : this.#problemOfToken(body);
    if (status < 400 || status > 499) return `status ${status}`;
    return may === "ok" && `refused: ${status} ${body}`;
  }

  /** The fields of this name in the bytes that were sent. */
  #fields(name: string): string[] {
    const [first = ""] = this.bytes.toString("latin1").split("\r\n\r\n", 1);
    const fields = [...first.matchAll(/\r\n([^:\r]*):([^\r]*)/g)];
    const found = fields.filter(([, other = ""]) => other.toLowerCase() === name);
    return found.map(([, , value = ""]) => value.trim());
  }

  /** Whether the request holds the credentials of the client, and once. */
  #hasCredentials(): boolean {
    const parameters = new URLSearchParams(Buffer.from(this.text, "latin1").toString());
    const only = (name: string) => parameters.getAll(name).join("\n");
    if (this.client_id === "app") return isSigned(only("client_assertion"), app);
    const [, basic] = /^Basic +(\S+)$/i.exec(this.#fields("authorization").join()) ?? [];
    const decoded = basic && Buffer.from(basic, "base64").toString().split(":");
    const sent = decoded
      ? decoded.map((text) => new URLSearchParams(`=${text}`).get(""))
      : [only("client_id"), only("client_secret")];
    return Bun.deepEquals(sent, [this.client_id, secrets.get(this.client_id)]);
  }

  #isProven(): boolean {
    return this.#fields("dpop").some((proof) => isSigned(proof, prover));
  }

  #problemOfToken(body: string): string | false {
    const { at, client_id, may } = this;
    if (!this.#hasCredentials()) return "a token without the credentials";
    const { access_token, token_type, scope, expires_in } = JSON.parse(body);
    const { iss, sub, aud, cnf, ...claims } = jose.decodeJwt<Record<string, any>>(access_token);
    const named = [iss, aud, sub, claims["client_id"], claims["scope"], expires_in];
    const wanted = [at.issuer, at.resource, client_id, client_id, scope, 3600];
    if (!Bun.deepEquals(named, wanted) || !/^(api1( read)?|read)$/.test(scope))
      return `another token: ${body}`;
    if (cnf?.jkt !== (token_type === "DPoP" ? jkt : undefined)) return "bound to another key";
    if (token_type === "DPoP") return !this.#isProven() && "bound without a proof";
    return (client_id === "bound" || (may === "ok" && this.isBound)) && "not bound";
  }

  #problemOfCall(body: string): string | false {
    const field = this.#fields("authorization").join(", ");
    const [, scheme = "", token = ""] = /^(Bearer|DPoP) +(\S+)$/i.exec(field) ?? [];
    if (!isSigned(token, this.at.signer!)) return "accepted without a token";
    if (this.isBound !== /^dpop$/i.test(scheme)) return "accepted with the other scheme";
    if (this.isBound && !this.#isProven()) return "accepted without a proof";
    const claims: { value: string }[] = JSON.parse(body);
    const isTheirs = claims.some(({ value }) => value === this.client_id);
    return !isTheirs && "the claims of somebody else";
  }
}

/**
 * Sends `count` hostile requests over 16 connections, some that succeed again. Resolves with the
 * kinds of bends, with the answers but 200 that differ, and with what is wrong.
 */
export async function attack(at: Target, seed: number, count: number) {
  const [bends, refusals] = [new Set<string>(), new Set<string>()];
  const tally = { sent: 0, accepted: 0, bends, refusals, problems: [] as string[] };
  const url = at.signer ? at.resource : at.issuer;
  let next = 0;
  const worker = async () => {
    let connection = await Connection.open(url);
    while (next < count) {
      const index = next++;
      const hostile = new Hostile(at, seed, index);
      const { name, bytes } = hostile;
      bends.add(name);
      for (const isAgain of [false, true]) {
        if (connection.isClosed) connection = await Connection.open(url);
        const answer = await connection.send(bytes);
        const { status, headers, body } = answer;
        if (headers.get("connection") === "close" || status < 1) connection.close();
        headers.delete("date");
        tally.sent++;
        if (status === 200) tally.accepted++;
        else refusals.add(JSON.stringify([status, ...headers, body]));
        const problem = hostile.problemOf(answer, isAgain);
        const sent = JSON.stringify(bytes.toString("latin1").slice(0, 3_000));
        if (problem) tally.problems.push(`${problem}: #${index} of seed ${seed}: ${name}: ${sent}`);
        if (status !== 200 || index % 5 !== 0) break;
      }
    }
    connection.close();
  };
  await Promise.all(Array.from({ length: 16 }, worker));
  return tally;
}
