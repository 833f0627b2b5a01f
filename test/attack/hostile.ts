/**
 * Hostile input by a seed: valid token requests and API calls, the ways to bend them, and what may
 * come of it. hostile.test.ts sends some of it, soak.ts sends much of it. The same seed makes the
 * same requests, but for ports and times.
 */

import { createHash, createPrivateKey, createPublicKey, sign, verify } from "node:crypto";
import { connect, type Socket } from "node:net";
import * as jose from "jose";
import type { ClientRegistration } from "../../config.ts";
import { form as formType } from "../support/http.ts";
import { assertionType, secondsNow as now } from "../support/jwt.ts";

const sha256 = (text: string, encoding: "base64" | "base64url") =>
  createHash("sha256").update(text).digest(encoding);

export const repeat = <Value>(count: number, make: (index: number) => Value) =>
  Array.from({ length: count }, (_value, index) => make(index));

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
  word = (length = 12) => repeat(length, () => this.below(36).toString(36)).join("");

  /** A text with a small change or several, never with a line break. */
  mutate = (text: string): string => {
    const at = this.below(text.length + 1);
    const [before, rest] = [text.slice(0, at), text.slice(at)];
    const unit = String.fromCharCode(this.below(256)).replace(/[\r\n]/, "\t");
    const changed = [unit + rest, unit + rest.slice(1), rest.slice(1), "", swapCase(rest)];
    const mutated = before + this.pick([...changed, rest.slice(0, 20) + rest]);
    return this.once(2) ? mutated : this.mutate(mutated);
  };
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

/** HTTP/1.1 by hand over one socket: what is sent need not make sense. */
export class Connection {
  isClosed = false;
  #received = "";
  #event = Promise.withResolvers<void>();
  readonly #socket: Socket;

  constructor(url: string) {
    const { hostname, port } = new URL(url);
    this.#socket = connect(Number(port), hostname);
    const wake = (received: string, isClosed = false) => {
      this.#received += received;
      this.isClosed ||= isClosed;
      this.#event.resolve();
      this.#event = Promise.withResolvers();
    };
    this.#socket.setEncoding("latin1").on("data", wake);
    for (const end of ["close", "error"]) this.#socket.on(end, () => wake("", true));
  }

  write = (bytes: string) => this.#socket.write(bytes, "latin1");
  close = () => {
    this.isClosed = true;
    this.#socket.destroy();
  };

  /** Sends a request, and waits for its answer. */
  async send(bytes: string): Promise<RawAnswer> {
    this.write(bytes);
    return await this.next();
  }

  /** The next answer. */
  async next(seconds = 20): Promise<RawAnswer> {
    const deadline = performance.now() + seconds * 1000;
    const timer = setTimeout(() => this.#event.resolve(), seconds * 1000 + 1);
    let answer = this.#parse();
    while (!answer && !this.isClosed && performance.now() < deadline) {
      await this.#event.promise;
      answer = this.#parse();
    }
    clearTimeout(timer);
    return answer ?? { status: this.isClosed ? 0 : -1, headers: new Map(), body: "" };
  }

  #parse(): RawAnswer | undefined {
    this.#received = this.#received.replace(/^HTTP\/1\.1 1.*?\r\n\r\n/s, ""); // 100 Continue
    const [, head, rest = ""] = /^(.*?)\r\n\r\n(.*)$/s.exec(this.#received) ?? [];
    if (head === undefined) return undefined;
    const fields = head.matchAll(/\r\n([^:\r]*): *([^\r]*)/g);
    const headers = new Map([...fields].map(([, name, value]) => [name!.toLowerCase(), value!]));
    const length = Number(headers.get("content-length") ?? 0);
    if (rest.length < length) return undefined;
    this.#received = rest.slice(length);
    const status = Number(/^HTTP\/1\.1 (\d{3})/.exec(head)?.[1] ?? 999);
    return { status, headers, body: rest.slice(0, length) };
  }
}

/** One request on a connection of its own. */
export async function once(url: string, request: string): Promise<RawAnswer> {
  const connection = new Connection(url);
  return await connection.send(request).finally(connection.close);
}

// --- Parties -------------------------------------------------------------------------------------

/** An Ed25519 key that is the same in every run (RFC 8410 §7: what stands before its 32 bytes). */
export function signerNamed(kid: string) {
  const prefix = Buffer.from("302e020100300506032b657004220420", "hex");
  const der = Buffer.concat([prefix, createHash("sha256").update(kid).digest()]);
  const privateKey = createPrivateKey({ key: der, format: "der", type: "pkcs8" });
  const publicKey = createPublicKey(privateKey);
  const jwk = publicKey.export({ format: "jwk" }) as jose.JWK;
  return { privateKey, publicKey, jwk, publicJwk: { ...jwk, kid, alg: "Ed25519" } };
}
export type Signer = ReturnType<typeof signerNamed>;

const app = signerNamed("app");
const prover = signerNamed("proof");
const jkt = await jose.calculateJwkThumbprint(prover.jwk);

const secrets = new Map([
  ["client", "secret"],
  ["bound", "a secret of the bound client"],
  ["öd d:client%1", "s%e c+r&t=:é\u{1f4a9}"],
]);

/** The registrations that the token requests are for. */
export function hostileClients(resource: string) {
  const clients = [...secrets.keys(), "app"].map((client_id): ClientRegistration => ({
    client_id,
    client_secrets: [{ sha256: sha256(secrets.get(client_id) ?? "none", "base64") }],
    jwks: { keys: client_id === "app" ? [app.publicJwk] : [] },
    grant_types: ["client_credentials"],
    scope: "api1 read",
    access_token_lifetime_seconds: 3600,
    dpop_bound_access_tokens: client_id === "bound",
  }));
  const scopes = ["api1", "read"].map((scope) => ({ scope, description: scope, resource }));
  return { clients, scopes };
}

/** What is in this output of a program although it is nobody's business: secrets, JWTs, keys. */
export function leaksIn(output: string): string[] {
  const patterns = [/eyJ[\w-]{8,}/, /"d"\s*:\s*"/, /PRIVATE KEY/];
  const confidential = [...[...secrets.values()].slice(1), btoa("client:secret")];
  const found = patterns.flatMap((pattern) => pattern.exec(output)?.[0] ?? []);
  return [...found, ...confidential.filter((word) => output.includes(word))];
}

// --- JWTs and plain requests ---------------------------------------------------------------------

type Members = Record<string, unknown>;

export type Jwt = { header: Members; claims: Members; key: Signer };

export const encode = ({ header, claims, key }: Jwt) =>
  encodeTexts([JSON.stringify(header), JSON.stringify(claims)], key);

/** A JWT of a header and claims that need not be JSON. */
function encodeTexts(texts: string[], { privateKey }: Signer): string {
  const input = texts.map((text) => Buffer.from(text).toString("base64url")).join(".");
  return `${input}.${sign(null, Buffer.from(input), privateKey).toString("base64url")}`;
}

/** Whether a JWT is signed with the key: worked out here, not by the code under test. */
function isSigned(jwt: string, { publicKey }: Signer): boolean {
  const [header, claims, signature = ""] = jwt.split(".");
  const bytes = Buffer.from(signature, "base64url");
  return verify(null, Buffer.from(`${header}.${claims}`), publicKey, bytes);
}

/** Whom the requests are for. With a signer they are API calls, else token requests. */
export type Target = { issuer: string; resource: string; signer?: Signer };

const randomJti = (): string => crypto.randomUUID();

/** A token that is good at the API for ten minutes, as it is or bound to the key of the proofs. */
export function tokenFor(at: Target, client_id: string, isBound = false, jti = randomJti()): Jwt {
  const header = { alg: "Ed25519", kid: at.signer!.publicJwk.kid, typ: "at+jwt" };
  const ids = { iss: at.issuer, aud: at.resource, sub: client_id, client_id, scope: "api1", jti };
  const claims = { ...ids, iat: now(), exp: now() + 600, ...(isBound && { cnf: { jkt } }) };
  return { header, claims, key: at.signer! };
}

export function proofFor(htm: string, htu: string, token = "", jti = randomJti()): Jwt {
  const ath = token && { ath: sha256(token, "base64url") };
  const header = { alg: "Ed25519", typ: "dpop+jwt", jwk: prover.jwk };
  return { header, claims: { htm, htu, iat: now(), jti, ...(ath || {}) }, key: prover };
}

export function assertionFor(issuer: string, jti = randomJti()): Jwt {
  const header = { alg: "Ed25519", kid: "app", typ: "JWT" };
  const claims = { iss: "app", sub: "app", aud: issuer, jti, exp: now() + 60 };
  return { header, claims, key: app };
}

const head = (...lines: string[]) => `${lines.join("\r\n")}\r\n\r\n`;

/** A token request with the secret of "client", and further header fields. */
export function tokenRequest(...fields: string[]): string {
  const body = "grant_type=client_credentials&scope=api1";
  const basic = `Authorization: Basic ${btoa("client:secret")}`;
  const line = ["POST /connect/token HTTP/1.1", "Host: x", `Content-Length: ${body.length}`];
  return head(...line, `Content-Type: ${formType}`, basic, ...fields) + body;
}

/** An API call, and further header fields. */
export const callRequest = (token: string, scheme = "Bearer", ...fields: string[]) =>
  head("GET /identity HTTP/1.1", "Host: x", `Authorization: ${scheme} ${token}`, ...fields);

// --- Bends ---------------------------------------------------------------------------------------

const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);

/** What is done to the JSON of a JWT before it is signed: it need not be an object any more. */
function bendJson(text: string, chance: Chance): string {
  const deep = `${text.slice(0, -1)},"deep":${nested(chance.below(4_500))}}`;
  const twice = `{"alg":"none","kid":"other","sub":"other",${text.slice(1)}`;
  const others = [deep, twice, "null", "[]", '"x"', "{}{}", nested(3_000)];
  return chance.once(2) ? chance.mutate(text) : chance.pick(others);
}

type Pairs = [name: string, value: string][];
const formEncode = (text: string) => new URLSearchParams([["", text]]).toString().slice(1);

function mutateOne(pairs: Pairs, chance: Chance): void {
  const [pair, which] = [chance.pick(pairs), chance.below(2)];
  pair[which] = chance.mutate(pair[which]!);
}

type Change = (request: Hostile, chance: Chance) => unknown;

/** These change nothing that counts. */
const harmless: Change[] = [
  ({ headers }) => headers.reverse(),
  ({ form }) => form.reverse(),
  ({ headers }) => headers.forEach((pair) => (pair[0] = swapCase(pair[0]))),
  ({ headers }, { word }) => headers.push(["X-Forwarded-Host", "x"], [`X-${word(9)}`, "\xff;,="]),
  ({ headers }) => headers.push(["Expect", "100-continue"]),
  (request, { pick }) =>
    (request.host = pick(["Host: evil.example", "Host: [::1]:1", "Host: a_b"])),
  (request, { word }) => (request.target += `?${word()}=%zz&grant_type=x`),
  (request) => (request.target = request.target.replace(/^\//, "http://evil.example/")),
];

const methods = ["PUT", "DELETE", "OPTIONS", "TRACE", "FOO", "get", "post", "GET\0", "GET", "POST"];
const oddFields = [
  ...["a\0b", "a\r\n b", "a\r\nX y: z", "a\nAuthorization: Basic eDp5", "x".repeat(20_000)],
  ...["a\r\nContent-Length: 1", "a\r\nTransfer-Encoding: chunked", "y\r\nX: ".repeat(300)],
];
const malformed = ["%", "%4", "%zz", "%00", "%ff", "%c3%28", "%c0%af", "%ed%a0%80", "\0", "\xff"];

/** These may make a difference, as those of the secret and of JWTs may. */
const bends: Record<string, Change> = {
  "a field": ({ headers }, chance) => mutateOne(headers, chance),
  "an odd field": ({ headers }, { pick }) => headers.push(["X", pick(oddFields)]),
  "a field twice": ({ headers }, { pick }) => headers.push([...pick(headers)]),
  "no Host": (request) => (request.host = "Hos: x"),
  "the target": (request, chance) => (request.target = chance.mutate(request.target)),
  "the method": (request, { pick }) => (request.method = pick(methods)),
  "a parameter": ({ form }, chance) => form.length && mutateOne(form, chance),
  "a parameter twice": ({ form }, { pick }) => form.length && form.push([...pick(form)]),
  "an odd parameter": ({ form }, { below, pick }) =>
    form.length && (pick(form)[below(2)] += pick([...malformed, "x".repeat(16_384)])),
};
const bendNames = [...Object.keys(bends), "the secret", "a JWT", "a JOSE header", "claims"];

// --- From a seed to a request --------------------------------------------------------------------

/** A request that is bent in one part of it, and what is known of it. Its texts are bytes. */
export class Hostile {
  readonly at: Target;
  readonly client_id: string;
  readonly isBound: boolean;
  method = "GET";
  target = "/identity";
  host = "Host: x";
  readonly headers: Pairs = [];
  /** Name and value of each parameter, encoded. */
  readonly form: Pairs = [];
  /** What is bent. Whether anything is: without, it must succeed. */
  readonly name: string;
  isBent = false;
  readonly #chance: Chance;

  /** The request of this seed and index. */
  constructor(at: Target, seed: number, index: number) {
    const chance = new Chance(seed, index);
    this.at = at;
    this.#chance = chance;
    this.name = chance.once(4) ? "nothing" : chance.pick(bendNames);
    this.client_id = at.signer ? chance.word() : chance.pick([...secrets.keys(), "app"]);
    this.isBound = this.client_id === "bound" || chance.once(3);
    if (at.signer) this.#makeCall();
    else this.#makeTokenRequest();
    for (let count = chance.below(3); count > 0; count--) chance.pick(harmless)(this, chance);
    const bend = bends[this.name];
    const before = this.bytes;
    bend?.(this, chance);
    this.isBent ||= this.bytes !== before;
  }

  #makeCall(): void {
    const { at, client_id, isBound, headers } = this;
    const token = this.#encode(tokenFor(at, client_id, isBound, this.#chance.word()));
    headers.push(["Authorization", `${isBound ? "DPoP" : "Bearer"} ${token}`]);
    if (isBound) this.#prove("GET", `${at.resource}/identity`, token);
  }

  #makeTokenRequest(): void {
    const { at, client_id, headers, form } = this;
    const chance = this.#chance;
    Object.assign(this, { method: "POST", target: "/connect/token" });
    headers.push(["Content-Type", formType]);
    form.push(["grant_type", "client_credentials"], ["__proto__", ""], ["a", "1"], ["a", "2"]);
    if (chance.once(2)) form.push(["scope", "api1"]);
    if (chance.once(4)) form.push(["resource", formEncode(at.resource)]);
    const secret = this.#bend("the secret", secrets.get(client_id) ?? "", chance.mutate);
    const [id = "", word = ""] = [client_id, secret].map(formEncode);
    if (client_id === "app") {
      const jwt = this.#encode(assertionFor(at.issuer, chance.word()));
      form.push(["client_assertion_type", formEncode(assertionType)], ["client_assertion", jwt]);
    } else if (chance.once(2)) headers.push(["Authorization", `Basic ${btoa(`${id}:${word}`)}`]);
    else form.push(["client_id", id], ["client_secret", word]);
    if (this.isBound) this.#prove("POST", `${at.issuer}/connect/token`);
  }

  #prove(htm: string, htu: string, token?: string): void {
    const proof = proofFor(htm, htu, token, this.#chance.word());
    this.headers.push(["DPoP", this.#encode(proof)]);
  }

  #encode({ header, claims, key }: Jwt): string {
    const texts = [
      this.#bend("a JOSE header", JSON.stringify(header), bendJson),
      this.#bend("claims", JSON.stringify(claims), bendJson),
    ];
    return this.#bend("a JWT", encodeTexts(texts, key), this.#chance.mutate);
  }

  #bend(name: string, text: string, bend: (text: string, chance: Chance) => string): string {
    if (name !== this.name) return text;
    const bent = bend(text, this.#chance);
    this.isBent ||= bent !== text;
    return bent;
  }

  get text(): string {
    return this.form.map((pair) => pair.join("=")).join("&");
  }

  get bytes(): string {
    const fields = this.headers.map((pair) => pair.join(": "));
    const line = `${this.method} ${this.target} HTTP/1.1`;
    return head(line, this.host, ...fields, `Content-Length: ${this.text.length}`) + this.text;
  }

  // --- What may come back ------------------------------------------------------------------------

  /** What is wrong with an answer, if anything. */
  problemOf({ status, body }: RawAnswer, isAgain: boolean): string | false {
    const isUsedUp = isAgain && (this.#fields("dpop").length > 0 || this.client_id === "app");
    if (status === -1) return "no answer";
    // Bun itself hangs up on a method that it does not know, and says 505 to a bad first line.
    const isKnown = /^(GET|POST|PUT|DELETE|PATCH|OPTIONS|TRACE)$/.test(this.method);
    if (status === 0) return isKnown && "hung up without an answer";
    if (status === 505) return !this.isBent && "status 505";
    if (status === 200 && isUsedUp) return "accepted twice";
    if (status === 200)
      return this.at.signer ? this.#problemOfCall(body) : this.#problemOfToken(body);
    if (status < 400 || status > 499) return `status ${status}`;
    return !this.isBent && !isUsedUp && `refused: ${status} ${body}`;
  }

  /** The fields of this name in the bytes that were sent. */
  #fields(name: string): string[] {
    const [first = ""] = this.bytes.split("\r\n\r\n", 1);
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
    const { at, client_id } = this;
    if (!this.#hasCredentials()) return "a token without the credentials";
    const { access_token, token_type, scope, expires_in } = JSON.parse(body);
    const { iss, sub, aud, cnf, ...claims } = jose.decodeJwt<Record<string, any>>(access_token);
    const named = [iss, aud, sub, claims["client_id"], claims["scope"], expires_in];
    const wanted = [at.issuer, at.resource, client_id, client_id, scope, 3600];
    if (!Bun.deepEquals(named, wanted) || !/^(api1( read)?|read)$/.test(scope))
      return `another token: ${body}`;
    if (cnf?.jkt !== (token_type === "DPoP" ? jkt : undefined)) return "bound to another key";
    if (token_type === "DPoP") return !this.#isProven() && "bound without a proof";
    return (client_id === "bound" || (!this.isBent && this.isBound)) && "not bound";
  }

  #problemOfCall(body: string): string | false {
    const field = this.#fields("authorization").join(", ");
    const [, scheme = "", token = ""] = /^(Bearer|DPoP) +(\S+)$/i.exec(field) ?? [];
    if (!isSigned(token, this.at.signer!)) return "accepted without a token";
    if (this.isBound !== /^dpop$/i.test(scheme)) return "accepted with the other scheme";
    if (this.isBound && !this.#isProven()) return "accepted without a proof";
    const claims: { value: string }[] = JSON.parse(Buffer.from(body, "latin1").toString());
    return !claims.some(({ value }) => value === jose.decodeJwt(token).sub) && "other claims";
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
    let connection = new Connection(url);
    while (next < count) {
      const index = next++;
      const hostile = new Hostile(at, seed, index);
      const { name, bytes } = hostile;
      bends.add(name);
      for (const isAgain of [false, true]) {
        if (connection.isClosed) connection = new Connection(url);
        const answer = await connection.send(bytes);
        const { status, headers, body } = answer;
        if (headers.get("connection") === "close" || status < 1) connection.close();
        headers.delete("date");
        tally.sent++;
        if (status === 200) tally.accepted++;
        else refusals.add(JSON.stringify([status, ...headers, body]));
        const problem = hostile.problemOf(answer, isAgain);
        const sent = JSON.stringify(bytes.slice(0, 3_000));
        if (problem) tally.problems.push(`${problem}: #${index} of seed ${seed}: ${name}: ${sent}`);
        if (status !== 200 || index % 5 !== 0) break;
      }
    }
    connection.close();
  };
  await Promise.all(repeat(16, worker));
  return tally;
}
