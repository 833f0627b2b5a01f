/**
 * Hostile input by a seed: token requests and API calls that are valid, the ways to bend them, what
 * each bend may come to, and a connection that sends any bytes. Both hostile.test.ts and soak.ts use it.
 */

import {
  createHmac,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  sign,
  verify,
} from "node:crypto";
import * as jose from "jose";
import type { ClientRegistration } from "../config.ts";
import type { Changes } from "./support.ts";

// --- Chance --------------------------------------------------------------------------------------

/** Numbers that look random and are the same for the same seed and index (mulberry32). */
export class Random {
  #state: number;

  constructor(seed: number, index = 0) {
    this.#state = (seed ^ Math.imul(index + 1, 0x9e3779b1)) >>> 0;
  }

  number(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (mixed ^ (mixed >>> 14)) >>> 0;
  }

  below = (limit: number) => this.number() % limit;
  once = (inHowMany: number) => this.below(inHowMany) === 0;
  pick = <Value>(list: readonly Value[]): Value => list[this.below(list.length)]!;
  bytes = (length: number) => Buffer.from(Array.from({ length }, () => this.below(256)));
  word = (length = 12) => this.bytes(length).toString("base64url").slice(0, length);

  /** Text in which nothing is too strange, as the bytes of its UTF-8. */
  junk(): string {
    const strange = [
      "\0",
      "\u202e",
      "\ud800",
      "\u{1f4a9}",
      "é",
      "<b>",
      "';--",
      "%00",
      "../",
      "${x}",
    ];
    const parts = Array.from(
      { length: 1 + this.below(4) },
      () => this.pick(strange) + this.word(6),
    );
    return Buffer.from(parts.join("")).toString("latin1");
  }

  shuffle<Value>(list: Value[]): void {
    for (let i = list.length - 1; i > 0; i--) {
      const other = this.below(i + 1);
      [list[i], list[other]] = [list[other]!, list[i]!];
    }
  }

  /** A text with one to three small changes, never with a line break. */
  mutate(text: string): string {
    let mutated = text;
    for (let changes = 1 + this.below(3); changes > 0; changes--) {
      const at = this.below(mutated.length + 1);
      const other = this.below(mutated.length + 1);
      const unit = String.fromCharCode(this.below(256)).replace(/[\r\n]/, "\t");
      const [before, rest] = [mutated.slice(0, at), mutated.slice(at)];
      mutated = this.pick([
        () => before + unit + rest,
        () => before + unit + rest.slice(1),
        () => before + rest.slice(1),
        () => before,
        () => mutated.slice(0, other) + rest,
        () => before + rest.slice(0, 20) + rest,
        () => before + rest.replace(/[a-z]/i, (letter) => swapCase(letter)),
      ])();
    }
    return mutated;
  }
}

const swapCase = (letter: string) =>
  letter === letter.toLowerCase() ? letter.toUpperCase() : letter.toLowerCase();

// --- A connection that sends anything ------------------------------------------------------------

/** Status 0: hung up without an answer. Status -1: no answer in time. */
export interface Answer {
  status: number;
  headers: Map<string, string>;
  body: string;
}

/** HTTP/1.1 by hand over one socket: what is sent need not make sense. */
export class Connection {
  closed = false;
  #received = "";
  #unsent: Uint8Array[] = [];
  #waiting: { isHead: boolean; resolve: (answer: Answer) => void }[] = [];
  #socket!: Bun.Socket;

  static async open(origin: string, ca?: string): Promise<Connection> {
    const connection = new Connection();
    const { hostname, port } = new URL(origin);
    connection.#socket = await Bun.connect({
      hostname: hostname.replace(/^\[|\]$/g, ""),
      port: Number(port),
      ...(ca && { tls: { ca } }),
      socket: {
        data: (_, chunk) => connection.#take(chunk),
        drain: () => connection.#flush(),
        close: () => connection.#end(),
        error: () => connection.#end(),
      },
    });
    return connection;
  }

  write(bytes: string | Uint8Array): void {
    this.#unsent.push(typeof bytes === "string" ? Buffer.from(bytes, "latin1") : bytes);
    this.#flush();
  }

  /** Sends a request and waits for its answer, at most `seconds`. */
  async send(bytes: string | Uint8Array, isHead = false, seconds = 8): Promise<Answer> {
    const answer = this.next(isHead, seconds);
    this.write(bytes);
    return await answer;
  }

  /** The next answer that is not awaited yet. */
  async next(isHead = false, seconds = 8): Promise<Answer> {
    const { promise, resolve } = Promise.withResolvers<Answer>();
    const timer = setTimeout(() => resolve(nothing(-1)), seconds * 1000);
    this.#waiting.push({ isHead, resolve });
    if (this.closed) this.#end();
    return await promise.finally(() => clearTimeout(timer));
  }

  close(): void {
    this.#socket.terminate();
  }

  #flush(): void {
    for (let first = this.#unsent[0]; first && !this.closed; first = this.#unsent[0]) {
      const written = this.#socket.write(first);
      if (written < 0) return;
      if (written < first.byteLength) return void (this.#unsent[0] = first.subarray(written));
      this.#unsent.shift();
    }
  }

  #take(chunk: Buffer): void {
    this.#received += chunk.toString("latin1");
    for (;;) {
      const first = this.#waiting[0];
      const end = this.#received.indexOf("\r\n\r\n") + 4;
      if (!first || end < 4) return;
      const [statusLine = "", ...fields] = this.#received.slice(0, end - 4).split("\r\n");
      const status = Number(/^HTTP\/1\.1 (\d{3})/.exec(statusLine)?.[1] ?? 999);
      const headers = new Map<string, string>();
      for (const field of fields) {
        const at = field.indexOf(":");
        headers.set(field.slice(0, at).toLowerCase(), field.slice(at + 1).trim());
      }
      const isBare = first.isHead || status < 200 || status === 204;
      const length = isBare ? 0 : Number(headers.get("content-length") ?? 0);
      if (this.#received.length < end + length) return;
      const body = this.#received.slice(end, end + length);
      this.#received = this.#received.slice(end + length);
      if (status < 200) continue; // 100 Continue
      this.#waiting.shift();
      first.resolve({ status, headers, body });
    }
  }

  #end(): void {
    this.closed = true;
    for (const { resolve } of this.#waiting.splice(0)) resolve(nothing(0));
  }
}

const nothing = (status: number): Answer => ({ status, headers: new Map(), body: "" });

// --- Keys and JWTs -------------------------------------------------------------------------------

export interface Pair {
  privateKey: KeyObject;
  jwk: jose.JWK & { kid: string };
}

export function pair(kid: string): Pair {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { privateKey, jwk: { ...(publicKey.export({ format: "jwk" }) as jose.JWK), kid } };
}

/** A JWT before it is signed. Texts stand for the JSON, `finish` bends the signed whole. */
export interface Jwt {
  header: Record<string, unknown>;
  claims: Record<string, unknown>;
  key: KeyObject;
  headerText?: string;
  claimsText?: string;
  finish?: (signed: string) => string;
}

const base64url = (text: string) => Buffer.from(text).toString("base64url");

export function encode({ header, claims, key, headerText, claimsText, finish }: Jwt): string {
  const texts = [headerText ?? JSON.stringify(header), claimsText ?? JSON.stringify(claims)];
  const input = texts.map(base64url).join(".");
  const signature = sign("sha256", Buffer.from(input), { key, dsaEncoding: "ieee-p1363" });
  const signed = `${input}.${signature.toString("base64url")}`;
  return finish ? finish(signed) : signed;
}

// --- Parties -------------------------------------------------------------------------------------

const own = { app: pair("app"), proof: pair("proof"), stranger: pair("app") };
const { kid: _, ...proofJwk } = own.proof.jwk;
const { kid: __, ...strangerJwk } = own.stranger.jwk;
const privateJwk = own.proof.privateKey.export({ format: "jwk" });
export const proofThumbprint = await jose.calculateJwkThumbprint(proofJwk);
export const proofKey = own.proof.privateKey;

const secrets: Record<string, string> = {
  client: "secret",
  bound: "a secret of the bound client",
  wide: "another, of the wide client",
  "öd d:client%1": "s%e c+r&t=:é\u{1f4a9}",
};
const sha256 = (text: string) => new Bun.CryptoHasher("sha256").update(text).digest("base64");

/** The registrations that the token requests are for. */
export function hostileClients(resource: string): NonNullable<Changes["authorizationServer"]> {
  const registration = (client_id: string, scope = "api1 read"): ClientRegistration => ({
    client_id,
    grant_types: ["client_credentials"],
    scope,
    access_token_lifetime_seconds: 3600,
    ...(secrets[client_id] && { client_secrets: [{ sha256: sha256(secrets[client_id]) }] }),
  });
  const clients = [
    registration("client"),
    registration("öd d:client%1"),
    registration("wide", "api1 other"),
    { ...registration("bound"), dpop_bound_access_tokens: true },
    { ...registration("app"), jwks: { keys: [own.app.jwk] } },
    { ...registration("nobody's"), grant_types: [], jwks: { keys: [own.app.jwk] } },
  ];
  const scopes = [
    { scope: "api1", description: "My API", resource },
    { scope: "read", description: "Reading", resource },
    { scope: "other", description: "Another API", resource: "https://other.example" },
  ];
  return { clients, scopes };
}

/** What must never be seen in the log of a program that gets these requests. */
export const confidential = [
  ...Object.values(secrets).filter((secret) => secret !== "secret"),
  ...Object.values(own).map(({ privateKey }) => `${privateKey.export({ format: "jwk" }).d}`),
];

// --- Requests ------------------------------------------------------------------------------------

/** ok: must succeed. refused: must not. either: may, if the credentials in it are still good. */
export type Outcome = "ok" | "refused" | "either";

/** A request as it is being bent. Texts are bytes (latin1); {…} stands for the JWT of that name. */
interface Draft {
  method: string;
  target: string;
  version: string;
  headers: [name: string, value: string][];
  /** Name and value of each parameter, encoded. */
  form: [name: string, value: string][];
  /** Instead of the form. */
  body?: string;
  isChunked?: boolean;
  jwts: { assertion?: Jwt; proof?: Jwt; token?: Jwt };
  client_id: string;
  scopes: string[];
}

interface Bend<Subject> {
  name: string;
  outcome: Outcome;
  bend: (subject: Subject, random: Random) => void;
}

const bendTo =
  (outcome: Outcome) =>
  <Subject>(name: string, bend: Bend<Subject>["bend"]): Bend<Subject> => ({ name, outcome, bend });
const ok = bendTo("ok");
const refused = bendTo("refused");
const either = bendTo("either");

/** A request that was bent, and what is known of it. */
export interface Hostile {
  name: string;
  outcome: Outcome;
  bytes: Buffer;
  isHead: boolean;
  /** It carries a JWT that may be used only once. */
  isOnce: boolean;
  draft: Draft;
  signed: Record<string, string>;
  /** Whom it is for. */
  at: Target;
}

const formEncode = (text: string) => new URLSearchParams([["", text]]).toString().slice(1);

function toBytes(draft: Draft, signed: Record<string, string>): Buffer {
  const fill = (text: string) =>
    text.replace(/\{(assertion|proof|token)\}/g, (_, name: string) => signed[name] ?? "");
  const body = fill(draft.body ?? draft.form.map((pair) => pair.join("=")).join("&"));
  const head = draft.headers.map(([name, value]) => `${name}: ${fill(value)}\r\n`).join("");
  const chunks = body.match(/[^]{1,100}/g) ?? [];
  const chunked = chunks.map((chunk) => `${chunk.length.toString(16)}\r\n${chunk}\r\n`).join("");
  const framed = draft.isChunked
    ? `Transfer-Encoding: chunked\r\n\r\n${chunked}0\r\n\r\n`
    : `${body || draft.method === "POST" ? `Content-Length: ${body.length}\r\n` : ""}\r\n${body}`;
  const line = `${draft.method} ${fill(draft.target)} ${draft.version}\r\n`;
  return Buffer.from(line + head + framed, "latin1");
}

const header = (draft: Draft, name: string) =>
  draft.headers.find((entry) => entry[0].toLowerCase() === name);
const setHeader = (draft: Draft, name: string, value: string) => {
  draft.headers = draft.headers.filter((entry) => entry[0].toLowerCase() !== name);
  draft.headers.push([name, value]);
};
const setParameter = (draft: Draft, name: string, value: string | undefined) => {
  draft.form = draft.form.filter((entry) => entry[0] !== name);
  if (value !== undefined) draft.form.push([name, value]);
};
const now = () => Math.floor(Date.now() / 1000);
const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);

// --- Bends of any JWT ----------------------------------------------------------------------------

/** Of another type or value than any claim or header member that is checked. */
const junkValues = (random: Random, value: unknown) =>
  random.pick<unknown>([
    ...[null, true, false, 0, -1, 1.5, "", " ", "__proto__", "\0", "\ud800", [], {}, [[]], 1e21],
    ...[{ toString: 1 }, { [`${value}`]: value }, [[value]], `${value} `, random.word(600)],
  ]);

const segments = (jwt: Jwt, change: (parts: string[]) => string[]) =>
  void (jwt.finish = (signed) => change(signed.split(".")).join("."));
const newSignature = (jwt: Jwt, make: (input: string, old: string) => string) =>
  segments(jwt, ([header, claims, old]) => [header!, claims!, make(`${header}.${claims}`, old!)]);

const jwtBends: Bend<Jwt>[] = [
  refused("signed by a stranger", (jwt) => void (jwt.key = own.stranger.privateKey)),
  refused("signed by a stranger, whose key is in the header", (jwt) => {
    jwt.key = own.stranger.privateKey;
    if (jwt.header["typ"] !== "dpop+jwt") jwt.header["jwk"] = strangerJwk;
    jwt.header["jku"] = "https://127.0.0.1:1/jwks";
    jwt.header["x5u"] = "https://127.0.0.1:1/x5u";
  }),
  refused("alg none", (jwt, random) => {
    jwt.header["alg"] = random.pick(["none", "None", "NONE", "nOnE"]);
    if (random.once(2)) newSignature(jwt, () => "");
  }),
  refused("HMAC with the public key", (jwt, random) => {
    jwt.header["alg"] = random.pick(["HS256", "HS384", "HS512"]);
    const secret = random.pick([JSON.stringify(own.app.jwk), "secret", "", `${own.app.jwk.x}`]);
    newSignature(jwt, (input) => createHmac("sha256", secret).update(input).digest("base64url"));
  }),
  refused("another alg", ({ header }, random) => {
    const algorithms = "RS256 ES384 ES512 EdDSA Ed25519 ML-DSA-44 PS256 es256 ES256K dir".split(
      " ",
    );
    header["alg"] = random.once(3) ? junkValues(random, "ES256") : random.pick(algorithms);
  }),
  refused("no alg", ({ header }) => void delete header["alg"]),
  refused("crit", ({ header }, random) => {
    header["crit"] = random.pick([["b64"], ["exp"], ["alg"], [], "b64", ["b64", "b64"], [1], {}]);
    if (random.once(2)) header["b64"] = random.pick([false, true, "false"]);
  }),
  refused("no signature", (jwt) => newSignature(jwt, () => "")),
  refused("signature of zeros", (jwt) => newSignature(jwt, () => "A".repeat(86))),
  refused("random signature", (jwt, random) =>
    newSignature(jwt, () =>
      random.bytes(random.pick([1, 63, 64, 64, 65, 256])).toString("base64url"),
    ),
  ),
  refused("signature cut or made longer", (jwt, random) =>
    newSignature(jwt, (_, old) => (random.once(2) ? old.slice(0, -4) : `${old}AAAA`)),
  ),
  refused("signature in DER", (jwt) =>
    newSignature(jwt, (input) => sign("sha256", Buffer.from(input), jwt.key).toString("base64url")),
  ),
  refused("signature of something else", (jwt, random) => {
    const options = { key: jwt.key, dsaEncoding: "ieee-p1363" } as const;
    newSignature(jwt, () => sign("sha256", random.bytes(40), options).toString("base64url"));
  }),
  refused("one letter of header or claims changed", (jwt, random) =>
    segments(jwt, (parts) => {
      const which = random.below(2);
      const at = random.below(parts[which]!.length);
      const letters = [...parts[which]!];
      letters[at] = letters[at] === "A" ? "B" : "A";
      parts[which] = letters.join("");
      return parts;
    }),
  ),
  refused("another number of segments", (jwt, random) =>
    segments(jwt, (parts) =>
      random.pick([
        parts.slice(0, 2),
        parts.slice(1),
        [...parts, "AAAA"],
        ["", ...parts],
        [...parts, "", ""],
      ]),
    ),
  ),
  refused("no JWT at all", (jwt, random) => {
    const junk = random.pick([
      ".",
      "..",
      "....",
      "a",
      "a.b.c",
      "e30.e30.",
      nested(50),
      random.word(90),
    ]);
    jwt.finish = () => junk;
  }),
  refused(
    "JWS in JSON",
    (jwt) =>
      void (jwt.finish = (signed) => {
        const [protected_, payload, signature] = signed.split(".");
        return JSON.stringify({ protected: protected_, payload, signature });
      }),
  ),
  refused("claims that are no JSON object", (jwt, random) => {
    const texts = ["", "null", "[]", "1", '"x"', "{", "{}{}", "{'a':1}", "\0", nested(3_000)];
    jwt.claimsText = random.pick(texts);
  }),
  refused("a header that is no JSON object", (jwt, random) => {
    const texts = ["", "null", "[]", "1", '"x"', "{", "{}", "{}{}", '{"alg":}', nested(3_000)];
    jwt.headerText = random.pick(texts);
  }),
  either("claims deeply nested", (jwt, random) => {
    const text = JSON.stringify(jwt.claims).slice(0, -1);
    jwt.claimsText = `${text},"deep":${nested(10 + random.below(4_000))}}`;
  }),
  either("header deeply nested", (jwt, random) => {
    const text = JSON.stringify(jwt.header).slice(0, -1);
    jwt.headerText = `${text},"deep":${nested(10 + random.below(4_000))}}`;
  }),
  either("members of the header twice", (jwt) => {
    jwt.headerText = `{"alg":"none","kid":"other",${JSON.stringify(jwt.header).slice(1)}`;
  }),
  refused(
    "claims behind __proto__",
    (jwt) => void (jwt.claimsText = `{"__proto__":${JSON.stringify(jwt.claims)}}`),
  ),
  ok("unknown members", (jwt, random) => {
    jwt.header[random.word(8)] = random.junk();
    jwt.header["x5t"] = random.word();
    jwt.claims["__proto__x"] = { admin: true };
    jwt.claims[random.word(8)] = [null, random.number(), { deep: [random.junk()] }];
  }),
  either(
    "bytes changed here and there",
    (jwt, random) => void (jwt.finish = (signed) => random.mutate(signed)),
  ),
];

/** Bends of the claims that must be there: each missing, and each of another type or value. */
function claimBends(names: string[]): Bend<Jwt>[] {
  return [
    refused("a claim missing", ({ claims }, random) => void delete claims[random.pick(names)]),
    refused("a claim of another type or value", ({ claims }, random) => {
      const name = random.pick(names);
      claims[name] = junkValues(random, claims[name]);
    }),
  ];
}

const assertionBends: Bend<Jwt>[] = [
  ...jwtBends,
  ...claimBends(["iss", "sub", "aud"]),
  refused(
    "jti missing or no text",
    ({ claims }, random) =>
      void (claims["jti"] = random.pick([undefined, null, "", 0, 1, true, [], ["x"], {}])),
  ),
  refused("another exp", ({ claims }, random) => {
    const others = [undefined, null, 0, -1, now() - 31, now() + 700, 1e18, "9999999999", [now()]];
    claims["exp"] = random.pick([...others, true, {}, `${now() + 60}`, now() * 1000]);
  }),
  refused("not valid yet", ({ claims }, random) => {
    const soon = random.pick([now() + 100, 1e18, "0", null, [], {}]);
    claims[random.pick(["nbf", "iat"])] = soon;
  }),
  refused("for somebody else", ({ claims }, random) => {
    const { aud } = claims;
    const others = [
      `${aud}/`,
      `${aud}/connect/token`,
      "https://other.example",
      [aud, "x"],
      [[aud]],
    ];
    claims["aud"] = random.pick([...others, { 0: aud }, [], `${aud}`.toUpperCase()]);
  }),
  ok("aud in a list", ({ claims }) => void (claims["aud"] = [claims["aud"]])),
  ok("no kid", ({ header }) => void delete header["kid"]),
  refused("another kid", ({ header }, random) => void (header["kid"] = random.junk())),
  refused("of another client", ({ claims }) => void (claims["iss"] = claims["sub"] = "client")),
  refused(
    "client registered without the grant",
    ({ claims }) => void (claims["iss"] = claims["sub"] = "nobody's"),
  ),
  ok("a long jti", ({ claims }, random) => void (claims["jti"] = random.word(3_000))),
];

const proofBends: Bend<Jwt>[] = [
  ...jwtBends.filter(({ name }) => name !== "signed by a stranger, whose key is in the header"),
  refused(
    "htm, htu or jti missing",
    ({ claims }, random) => void delete claims[random.pick(["htm", "htu", "jti"])],
  ),
  refused("another typ", ({ header }, random) => {
    header["typ"] = random.pick([undefined, "JWT", "at+jwt", "dpop", "dpop+jwt;x", null, 1, []]);
  }),
  refused("another htm", ({ claims }, random) => {
    const htm = `${claims["htm"]}`;
    const others = [htm.toLowerCase(), "PUT", "", `${htm} `, [htm], null, { toString: htm }];
    claims["htm"] = random.pick(others);
  }),
  refused("another htu", ({ claims }, random) => {
    const htu = `${claims["htu"]}`;
    const { host, pathname } = new URL(htu);
    const others = [
      `${htu}/`,
      `https://${host}x${pathname}`,
      htu.slice(0, -1),
      pathname,
      "",
      null,
      {},
    ];
    const more = [
      `${htu}%00`,
      htu.toUpperCase(),
      `http://u@${host}${pathname}`,
      `x${htu}`,
      7,
      "\0",
    ];
    claims["htu"] = random.pick([...others, ...more, `http://${host}/%2e%2e/x`]);
  }),
  ok(
    "htu with a query and a fragment",
    ({ claims }, random) =>
      void (claims["htu"] = `${claims["htu"]}?${random.word()}#${random.word()}`),
  ),
  refused("another iat", ({ claims }, random) => {
    const others = [undefined, null, 0, now() - 200, now() + 100, 1e18, `${now()}`, [now()], {}];
    claims["iat"] = random.pick(others);
  }),
  refused(
    "jti no text",
    ({ claims }, random) =>
      void (claims["jti"] = random.pick([null, "", 0, 1, true, [], ["x"], {}])),
  ),
  refused("a private key in the header", ({ header }, random) => {
    const extra = random.pick(["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"]);
    header["jwk"] = { ...proofJwk, [extra]: extra === "d" ? privateJwk.d : random.word() };
  }),
  refused("another jwk", ({ header }, random) => {
    const other = { ...proofJwk, x: random.bytes(32).toString("base64url") };
    const symmetric = { kty: "oct", k: "AAAA" };
    const odd = [undefined, null, "", "x", [], {}, [proofJwk], 1, true, { kty: "EC" }];
    const crv = { ...proofJwk, crv: "P-384" };
    header["jwk"] = random.pick([...odd, symmetric, other, strangerJwk, crv, { kty: ["EC"] }]);
  }),
];

// --- Bends of any HTTP request -------------------------------------------------------------------

/** Changes nothing that counts. These come first, so that they undo no other bend. */
const harmless: Bend<Draft>[] = [
  ok("order of the headers", ({ headers }, random) => random.shuffle(headers)),
  ok("unknown headers", (draft, random) => {
    const names = ["X-Forwarded-Host", "Forwarded", "Origin", "Cookie", "X-HTTP-Method-Override"];
    const value = () => random.word() + (random.once(3) ? "\xff\xe9;,=\"'" : "");
    for (let count = random.below(20); count > 0; count--) {
      draft.headers.push([random.once(2) ? random.pick(names) : `X-${random.word(9)}`, value()]);
    }
  }),
  ok("case of the header names", (draft, random) => {
    for (const entry of draft.headers) {
      entry[0] = entry[0].replace(/[a-z]/gi, (letter) =>
        random.once(2) ? swapCase(letter) : letter,
      );
    }
  }),
  ok("a query", (draft, random) => void (draft.target += `?${random.word()}=%zz&grant_type=x`)),
  ok(
    "another Host",
    (draft, random) =>
      void (header(draft, "host")![1] = random.pick(["evil.example", "[::1]:1", "a_b"])),
  ),
  ok(
    "the target as an absolute URL",
    (draft) => void (draft.target = `http://evil${draft.target}`),
  ),
  ok("Expect, Upgrade, TE", (draft, random) => {
    const extra: [string, string][] = [
      ["Expect", "100-continue"],
      ["Upgrade", "h2c"],
      ["TE", "gzip"],
    ];
    draft.headers.push(random.pick(extra));
  }),
];

const httpBends: Bend<Draft>[] = [
  refused("another path", (draft, random) => {
    const path = /\/connect\/token|\/identity/.exec(draft.target)![0];
    const others = [
      `${path}/`,
      `/${path}`,
      `${path}%00`,
      path.toUpperCase(),
      `${path};x`,
      "*",
      "/",
    ];
    const more = [`${path}%2f`, path.slice(0, -1), `/x${path}`, `${path}${random.word()}`, "/%"];
    const other = random.pick([...others, ...more, `/${random.word(3_000)}`, "/__proto__"]);
    draft.target = draft.target.replace(path, () => other);
  }),
  refused(
    "another version",
    (draft, random) => void (draft.version = random.pick(["HTTP/2.0", "HTTP/9.9", "HTTP", "x"])),
  ),
  refused(
    "no Host",
    (draft) => void (draft.headers = draft.headers.filter(([name]) => !/^host$/i.test(name))),
  ),
  refused(
    "headers of 20 kB",
    (draft, random) => void draft.headers.push(["X-Long", random.word(20_000)]),
  ),
  refused("300 headers", (draft, random) => {
    for (let count = 0; count < 300; count++) draft.headers.push([`X-${count}`, random.word(4)]);
  }),
  refused(
    "a header with NUL",
    (draft, random) => void draft.headers.push(["X-Nul", `a\0${random.word()}`]),
  ),
  refused(
    "a header that goes on in the next line",
    (draft, random) => void draft.headers.push(["X-Folded", `a\r\n ${random.word()}`]),
  ),
  refused(
    "a header name with a space",
    (draft, random) => void draft.headers.push([`X ${random.word()}`, "a"]),
  ),
  refused(
    "a line feed alone",
    (draft) => void draft.headers.push(["X-Line", "a\nAuthorization: Basic eDp5"]),
  ),
  refused(
    "two lengths",
    (draft) => void draft.headers.push(["Content-Length", "1"], ["Content-Length", "2"]),
  ),
  refused(
    "a length and chunks",
    (draft) => void draft.headers.push(["Content-Length", "1"], ["Transfer-Encoding", "chunked"]),
  ),
  either("a header changed here and there", (draft, random) => {
    const entry = random.pick(draft.headers);
    const which = random.below(2);
    entry[which] = random.mutate(entry[which]!);
  }),
  either(
    "the target changed here and there",
    (draft, random) => void (draft.target = random.mutate(draft.target)),
  ),
];

// --- Token requests ------------------------------------------------------------------------------

const oftenEncoded = (text: string) =>
  [...Buffer.from(text)].map((byte) => `%${byte.toString(16).padStart(2, "0")}`).join("");
const malformed = ["%", "%4", "%zz", "%00", "%ff", "%c3%28", "%c0%af", "%ed%a0%80", "\0", "\xff"];

const formBends: Bend<Draft>[] = [
  ok("unknown parameters", (draft, random) => {
    const names = ["__proto__", "constructor", "audience", "grant_type[]", "a", "", "a"];
    for (let count = 1 + random.below(30); count > 0; count--) {
      draft.form.push([random.pick(names), random.once(3) ? "" : random.word()]);
    }
  }),
  ok("order of the parameters", ({ form }, random) => random.shuffle(form)),
  ok("empty pairs", (draft) => void draft.form.unshift(["", ""], ["", ""])),
  ok("everything percent-encoded", (draft) => {
    for (const entry of draft.form) {
      const isJwt = entry[1].startsWith("{");
      const decoded = decodeURIComponent(entry[1].replaceAll("+", " "));
      draft.form[draft.form.indexOf(entry)] = [
        oftenEncoded(entry[0]),
        isJwt ? entry[1] : oftenEncoded(decoded),
      ];
    }
  }),
  ok("in chunks", (draft) => void (draft.isChunked = true)),
  ok("media type with case and charset", (draft) =>
    setHeader(draft, "content-type", "Application/X-WWW-Form-URLencoded ; charset=x"),
  ),
  ok("16 KiB, not one byte more", (draft) => {
    const length = toBytes({ ...draft, headers: [] }, {}).length;
    if (draft.jwts.assertion || length > 10_000) return;
    draft.form.push(["padding", ""]);
    const body = draft.form.map((entry) => entry.join("=")).join("&");
    draft.form.at(-1)![1] = "x".repeat(16_384 - body.length);
  }),
  refused("more than 16 KiB", (draft) => void draft.form.push(["padding", "x".repeat(16_384)])),
  refused("no grant_type", (draft) => setParameter(draft, "grant_type", undefined)),
  refused("an empty grant_type", (draft) => setParameter(draft, "grant_type", "")),
  refused("another grant_type", (draft, random) => {
    const others = ["password", "authorization_code", "__proto__", "client_credentials+", "+"];
    const more = ["Client_Credentials", formEncode(random.junk()), "client_credentials%0a", "[]"];
    setParameter(draft, "grant_type", random.pick([...others, ...more, "client%5fcredentialss"]));
  }),
  refused("a parameter twice", (draft, random) => {
    const known = draft.form.filter(([name]) => /^(grant_type|scope|client_)/.test(name));
    const [name, value] = random.pick(known);
    draft.form.push([name, random.pick([value, "", random.word()])]);
  }),
  refused("malformed encoding or NUL", (draft, random) => {
    const entry = random.pick(draft.form);
    const which = random.below(2);
    if (random.once(3)) draft.form.push([random.word(5), random.pick(malformed)]);
    else entry[which] = `${entry[which]}${random.pick(malformed)}`;
  }),
  refused(
    "semicolons instead of ampersands",
    (draft) =>
      void (draft.body = [...draft.form, ["a", "b"]].map((entry) => entry.join("=")).join(";")),
  ),
  refused("another media type", (draft, random) => {
    const others = ["text/plain", "application/json", "multipart/form-data; boundary=x", "", "*/*"];
    const more = ["application/x-www-form-urlencodedx", "application/x-www-form-urlencoded, a/b"];
    setHeader(draft, "content-type", random.pick([...others, ...more]));
  }),
  refused("JSON", (draft, random) => {
    const text = JSON.stringify(Object.fromEntries(draft.form));
    draft.body = random.pick([text, `[${text}]`, nested(7_000), "null", `"${text}"`]);
  }),
  refused("compressed", (draft) => {
    const body = draft.form.map((entry) => entry.join("=")).join("&");
    draft.headers.push(["Content-Encoding", "gzip"]);
    draft.body = Buffer.from(Bun.gzipSync(Buffer.from(body, "latin1"))).toString("latin1");
  }),
  refused(
    "random bytes",
    (draft, random) => void (draft.body = random.bytes(random.below(2_000)).toString("latin1")),
  ),
  refused("nothing", (draft) => void (draft.body = "")),
  refused("parameters in the query", (draft) => {
    draft.target += `?${draft.form.map((entry) => entry.join("=")).join("&")}`;
    draft.form = [];
  }),
  refused("another method", (draft, random) => {
    draft.method = random.pick([
      "GET",
      "PUT",
      "DELETE",
      "PATCH",
      "OPTIONS",
      "HEAD",
      "TRACE",
      "post",
      "FOO",
      "POST\0",
    ]);
    if (/^(GET|HEAD|TRACE|OPTIONS)$/.test(draft.method)) draft.form = [];
  }),
  refused("scope that is not granted", (draft, random) => {
    const others = ["api2", "api1+api2", "API1", "api1++read", "+api1", "api1+", "api1%09read"];
    const more = ["__proto__", "constructor", "api1,read", "%22", formEncode(random.junk()), "*"];
    setParameter(draft, "scope", random.pick([...others, ...more, "api1+other", "openid"]));
  }),
  ok("a scope twice", (draft) => {
    setParameter(draft, "scope", "api1+api1");
    draft.scopes = ["api1"];
  }),
  refused("another resource", (draft, random) => {
    const { resource } = target;
    const others = ["https://unknown.example", "/", "x", `${resource}/`, `${resource}#x`, "other"];
    const value = formEncode(random.once(4) ? random.junk() : random.pick(others));
    if (random.once(4)) draft.form.push(["resource", formEncode(resource)]);
    draft.form.push(["resource", value]);
  }),
  either("a parameter changed here and there", (draft, random) => {
    const entry = random.pick(draft.form);
    const which = random.below(2);
    entry[which] = random.mutate(entry[which]!);
  }),
];

const secretBends: Bend<Draft>[] = [
  refused("a wrong secret", (draft, random) => {
    const right = secrets[draft.client_id]!;
    const wrong = [right.slice(0, -1), `${right}x`, `${right} `, ` ${right}`, right.toUpperCase()];
    setSecret(draft, draft.client_id, random.pick([...wrong, random.word(40), "", sha256(right)]));
  }),
  refused("another client's secret", (draft, random) => {
    const others = Object.keys(secrets).filter((id) => id !== draft.client_id);
    setSecret(draft, random.pick([...others, "app"]), secrets[draft.client_id]!);
  }),
  refused("unknown client", (draft, random) => {
    const names = [
      "__proto__",
      "constructor",
      "toString",
      "",
      " ",
      "client ",
      "Client",
      "hasOwnProperty",
    ];
    const id = random.once(2) ? random.pick(names) : Buffer.from(random.junk()).toString();
    setSecret(draft, id, random.pick(["secret", "", random.word(), "undefined", "null"]));
  }),
  refused("two ways at once", (draft) => {
    if (header(draft, "authorization")) draft.form.push(["client_secret", "secret"]);
    else setHeader(draft, "authorization", `Basic ${btoa("client:secret")}`);
  }),
  refused("no credentials", (draft, random) => {
    draft.headers = draft.headers.filter(([name]) => !/^authorization$/i.test(name));
    draft.form = draft.form.filter(([name]) => !name.startsWith("client_"));
    if (random.once(2)) draft.form.push(["client_id", formEncode(draft.client_id)]);
  }),
  refused("another client_id besides", (draft, random) =>
    setParameter(draft, "client_id", random.pick(["app", "__proto__", random.word()])),
  ),
  refused("Basic malformed", (draft, random) => {
    const encoded = btoa("client:secret");
    const fields = [
      "Basic",
      "Basic ",
      `Basic:${encoded}`,
      `Basic ${btoa("client")}`,
      encoded,
      "Basic =",
    ];
    const more = [
      `Basic ${btoa("%zz:secret")}`,
      `Basic ${btoa("client:%")}`,
      "Basic \xff\xff",
      "Basic Y2xpZW50OnNlY3JldA===",
    ];
    const other = [
      `Bearer ${encoded}`,
      "Digest x",
      `Basic ${encoded}, Basic ${encoded}`,
      `Negotiate ${encoded}`,
    ];
    draft.form = draft.form.filter(([name]) => !name.startsWith("client_"));
    const junk = `Basic ${btoa(random.bytes(30).toString("latin1"))}`;
    setHeader(draft, "authorization", random.pick([...fields, ...more, ...other, junk]));
  }),
  refused("Authorization twice", (draft) => {
    const field = `Basic ${btoa("client:secret")}`;
    setHeader(draft, "authorization", field);
    draft.headers.push(["Authorization", field]);
  }),
];

function setSecret(draft: Draft, client_id: string, secret: string): void {
  if (header(draft, "authorization")) {
    const text = [client_id, secret].map(formEncode).join(":");
    return setHeader(draft, "authorization", `Basic ${btoa(text)}`);
  }
  setParameter(draft, "client_id", formEncode(client_id));
  setParameter(draft, "client_secret", formEncode(secret));
}

/** Whom the requests are for. */
export interface Target {
  issuer: string;
  resource: string;
  /** Signs the tokens for API calls; without it there are only token requests. */
  signer?: Pair;
}
let target: Target;

const assertionFor = (random: Random): Jwt => {
  const claims = { iss: "app", sub: "app", aud: target.issuer, exp: now() + 60, iat: now() };
  const jti = random.word(20) + crypto.randomUUID();
  return {
    header: { alg: "ES256", kid: "app" },
    claims: { ...claims, jti },
    key: own.app.privateKey,
  };
};

export const proofFor = (htm: string, htu: string, token?: string): Jwt => {
  const ath = token && new Bun.CryptoHasher("sha256").update(token).digest("base64url");
  const claims = { htm, htu, iat: now(), jti: crypto.randomUUID(), ...(ath && { ath }) };
  return { header: { alg: "ES256", typ: "dpop+jwt", jwk: proofJwk }, claims, key: proofKey };
};

function validTokenRequest(random: Random): Draft {
  const client_id = random.pick([...Object.keys(secrets), "app", "app"]);
  const draft: Draft = {
    method: "POST",
    target: "/connect/token",
    version: "HTTP/1.1",
    headers: [
      ["Host", new URL(target.issuer).host],
      ["Content-Type", "application/x-www-form-urlencoded"],
    ],
    form: [["grant_type", "client_credentials"]],
    jwts: {},
    client_id,
    scopes: ["api1", "read"],
  };
  if (client_id === "wide" || random.once(2)) {
    draft.form.push(["scope", "api1"]);
    draft.scopes = ["api1"];
  }
  if (random.once(4)) draft.form.push(["resource", formEncode(target.resource)]);
  if (client_id === "app") {
    draft.jwts.assertion = assertionFor(random);
    draft.form.push([
      "client_assertion_type",
      formEncode("urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
    ]);
    draft.form.push(["client_assertion", "{assertion}"]);
  } else {
    if (random.once(2)) draft.headers.push(["Authorization", ""]);
    setSecret(draft, client_id, secrets[client_id]!);
  }
  if (client_id === "bound" || random.once(4)) {
    draft.jwts.proof = proofFor("POST", `${target.issuer}/connect/token`);
    draft.headers.push(["DPoP", "{proof}"]);
  }
  return draft;
}

/** A plain token request with the secret of "client", and further header fields. */
export function tokenRequest(secret = "secret", ...fields: string[]): string {
  const body = "grant_type=client_credentials&scope=api1";
  const lines = [
    "POST /connect/token HTTP/1.1",
    "Host: x",
    `Authorization: Basic ${btoa(`client:${secret}`)}`,
    "Content-Type: application/x-www-form-urlencoded",
    `Content-Length: ${body.length}`,
    ...fields,
  ];
  return `${lines.join("\r\n")}\r\n\r\n${body}`;
}

// --- API calls -----------------------------------------------------------------------------------

const tokenClaimBends: Bend<Jwt>[] = [
  ...jwtBends,
  ...claimBends(["iss", "aud"]),
  refused(
    "another exp",
    ({ claims }, random) =>
      void (claims["exp"] = random.pick([
        undefined,
        null,
        "",
        `${now() + 60}`,
        [now() + 60],
        {},
        true,
      ])),
  ),
  refused("iat, sub, client_id or jti missing or empty", ({ claims }, random) => {
    const name = random.pick(["iat", "sub", "client_id", "jti"]);
    claims[name] = random.pick([undefined, null, "", [], {}, true]);
  }),
  refused(
    "expired",
    ({ claims }, random) => void (claims["exp"] = random.pick([0, -1, now() - 31, now() - 1e9])),
  ),
  refused(
    "not valid yet",
    ({ claims }, random) => void (claims["nbf"] = random.pick([now() + 100, "0", null, {}])),
  ),
  refused(
    "of another issuer",
    ({ claims }, random) =>
      void (claims["iss"] = random.pick([
        `${claims["iss"]}/`,
        "https://other.example",
        [claims["iss"]],
      ])),
  ),
  refused(
    "for another API",
    ({ claims }, random) =>
      void (claims["aud"] = random.pick([
        `${claims["aud"]}/`,
        "https://other.example",
        ["x", "y"],
        `${claims["aud"]}/identity`,
      ])),
  ),
  ok(
    "aud in a list",
    ({ claims }) => void (claims["aud"] = ["https://other.example", claims["aud"]]),
  ),
  refused(
    "another typ",
    ({ header }, random) =>
      void (header["typ"] = random.pick([
        undefined,
        "JWT",
        "dpop+jwt",
        "at",
        "at+jwt ",
        null,
        1,
        ["at+jwt"],
      ])),
  ),
  ok("the long typ", ({ header }) => void (header["typ"] = "application/at+jwt")),
  refused(
    "no kid, or an unknown one",
    ({ header }, random) =>
      void (header["kid"] = random.pick([
        undefined,
        "",
        null,
        random.word(),
        random.junk(),
        random.word(2_000),
      ])),
  ),
  refused(
    "without the scope",
    ({ claims }, random) =>
      void (claims["scope"] = random.pick([
        undefined,
        null,
        "",
        "api",
        "api11",
        "API1",
        "read",
        ["api2"],
        { api1: 1 },
        ["api1 read"],
        1,
        [["api1"]],
      ])),
  ),
  ok("the scope in a list", ({ claims }) => void (claims["scope"] = ["read", "api1"])),
  refused(
    "bound in another way",
    ({ claims }, random) =>
      void (claims["cnf"] = random.pick([
        {},
        null,
        "x",
        [],
        { "x5t#S256": "x" },
        { jkt: "" },
        { jkt: random.word(43) },
        { jkt: ["x"] },
        { jkt: {} },
        false,
        0,
      ])),
  ),
];

const callBends: Bend<Draft>[] = [
  refused(
    "no Authorization",
    (draft) =>
      void (draft.headers = draft.headers.filter(([name]) => !/^authorization$/i.test(name))),
  ),
  refused("Authorization malformed", (draft, random) => {
    const scheme = draft.jwts.proof ? "DPoP" : "Bearer";
    const fields = [
      "",
      scheme,
      `${scheme} `,
      `${scheme}\t{token}`,
      `${scheme} {token} {token}`,
      "{token}",
    ];
    const more = [
      `${scheme} "{token}"`,
      `${scheme} {token},`,
      `${scheme}: {token}`,
      `${scheme} \xff`,
    ];
    const junk = [
      `${scheme} ${random.word()}`,
      `${scheme} ${random.mutate("eyJhbGciOiJub25lIn0.e30.")}`,
    ];
    const others = ["Basic eDp5", "Digest x", `MAC {token}`, `${scheme} ${random.word(9_000)}`];
    setHeader(draft, "authorization", random.pick([...fields, ...more, ...junk, ...others]));
  }),
  refused("the other scheme", (draft) =>
    setHeader(draft, "authorization", `${draft.jwts.proof ? "Bearer" : "DPoP"} {token}`),
  ),
  refused(
    "Authorization twice",
    (draft, random) =>
      void draft.headers.push([
        "Authorization",
        random.pick([header(draft, "authorization")![1], "Bearer x", "Basic eDp5"]),
      ]),
  ),
  refused("the token in the query", (draft) => {
    draft.headers = draft.headers.filter(([name]) => !/^authorization$/i.test(name));
    draft.target += "?access_token={token}";
  }),
  refused("the token in the body", (draft) => {
    draft.headers = draft.headers.filter(([name]) => !/^authorization$/i.test(name));
    draft.headers.push(["Content-Type", "application/x-www-form-urlencoded"]);
    draft.form = [["access_token", "{token}"]];
  }),
  ok(
    "case of the scheme",
    (draft, random) =>
      void (header(draft, "authorization")![1] = header(draft, "authorization")![1].replace(
        /^\w+/,
        (scheme) => (random.once(2) ? scheme.toLowerCase() : scheme.toUpperCase()),
      )),
  ),
  ok(
    "more spaces",
    (draft) =>
      void (header(draft, "authorization")![1] = header(draft, "authorization")![1].replace(
        " ",
        "   ",
      )),
  ),
  refused(
    "another method",
    (draft, random) =>
      void (draft.method = random.pick([
        "POST",
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "TRACE",
        "get",
        "FOO",
        "GET\0",
      ])),
  ),
  ok("a body", (draft, random) => void (draft.form = [[random.word(), random.word(2_000)]])),
  either("a body of 20 kB", (draft) => void (draft.form = [["a", "x".repeat(20_000)]])),
];

/** A token that is good at the API, for ten minutes. */
export function tokenFor({ issuer, resource, signer }: Target, client_id: string): Jwt {
  const claims = { iss: issuer, aud: resource, sub: client_id, client_id, scope: "api1" };
  const header = { alg: "ES256", kid: signer!.jwk.kid, typ: "at+jwt" };
  const dates = { iat: now(), exp: now() + 600, jti: crypto.randomUUID() };
  return { header, claims: { ...claims, ...dates }, key: signer!.privateKey };
}

/** A plain API call, and further header fields. */
export function callRequest(token: string, scheme = "Bearer", ...fields: string[]): string {
  const lines = ["GET /identity HTTP/1.1", "Host: x", `Authorization: ${scheme} ${token}`];
  return `${[...lines, ...fields].join("\r\n")}\r\n\r\n`;
}

function validCall(random: Random): Draft {
  const { resource } = target;
  const client_id = random.word();
  const token = tokenFor(target, client_id);
  const isBound = random.once(3);
  if (isBound) token.claims["cnf"] = { jkt: proofThumbprint };
  const draft: Draft = {
    method: random.once(20) ? "HEAD" : "GET",
    target: "/identity",
    version: "HTTP/1.1",
    headers: [
      ["Host", new URL(resource).host],
      ["Authorization", `${isBound ? "DPoP" : "Bearer"} {token}`],
    ],
    form: [],
    jwts: { token },
    client_id,
    scopes: [],
  };
  if (isBound) {
    draft.jwts.proof = proofFor(draft.method, `${resource}/identity`);
    draft.headers.push(["DPoP", "{proof}"]);
  }
  return draft;
}

/** A proof for an API call is for one token, and by one key. */
const boundProofBends: Bend<Jwt>[] = [
  refused("proof by a stranger, all in order", (jwt) => {
    jwt.key = own.stranger.privateKey;
    jwt.header["jwk"] = strangerJwk;
  }),
  refused(
    "ath missing or of another token",
    ({ claims }, random) =>
      void (claims["ath"] = random.pick([undefined, null, "", random.word(43), [], {}, 1])),
  ),
];

/** About the proof's field itself. */
const proofFieldBends: Bend<Draft>[] = [
  refused("two proofs", (draft) => void draft.headers.push(["DPoP", "{proof}"])),
  refused("an empty proof", (draft) => setHeader(draft, "dpop", "")),
];

const noProof: Bend<Draft>[] = [
  refused("no proof where there must be one", (draft) => {
    draft.headers = draft.headers.filter(([name]) => !/^dpop$/i.test(name));
  }),
];

// --- From a seed to a request --------------------------------------------------------------------

/** The request of this seed and index: a token request, or a call if there is a signer. */
export function hostileRequest(at: Target, seed: number, index: number): Hostile {
  target = at;
  const random = new Random(seed, index);
  const draft = at.signer ? validCall(random) : validTokenRequest(random);
  const names: string[] = [];
  let outcome: Outcome = "ok";
  const apply = <Subject>({ name, outcome: may, bend }: Bend<Subject>, subject: Subject) => {
    bend(subject, random);
    names.push(name);
    if (outcome === "ok" || may === "refused") outcome = may;
  };
  const first = [...harmless];
  random.shuffle(first);
  for (const bend of first.slice(0, random.below(3))) apply(bend, draft);
  const { token, assertion, proof } = draft.jwts;
  const choices: (() => void)[] = [];
  const offer = <Subject>(bends: Bend<Subject>[], subject: Subject) =>
    choices.push(...bends.map((bend) => () => apply(bend, subject)));
  offer(httpBends, draft);
  offer(token ? callBends : formBends, draft);
  if (token) offer(tokenClaimBends, token);
  else if (assertion) offer(assertionBends, assertion);
  else offer(secretBends, draft);
  if (proof) offer([...proofBends, ...(token ? boundProofBends : [])], proof);
  if (proof) offer(proofFieldBends, draft);
  // Several times, for there are few such requests.
  const mustProve = proof && (token || draft.client_id === "bound");
  if (mustProve) for (let times = 0; times < 5; times++) offer(noProof, draft);
  if (!random.once(10)) random.pick(choices)();
  return signAll(draft, names.join(" + ") || "as it should be", outcome);
}

function signAll(draft: Draft, name: string, outcome: Outcome): Hostile {
  const { token, assertion, proof } = draft.jwts;
  const signed: Record<string, string> = {};
  if (token) signed["token"] = encode(token);
  if (assertion) signed["assertion"] = encode(assertion);
  if (proof && token && !("ath" in proof.claims)) {
    const digest = new Bun.CryptoHasher("sha256").update(signed["token"]!);
    proof.claims = { ...proof.claims, ath: digest.digest("base64url") };
  }
  if (proof) signed["proof"] = encode(proof);
  const bytes = toBytes(draft, signed);
  const isHead = draft.method === "HEAD";
  const isOnce = Boolean(assertion ?? (proof && fieldsOf(bytes, "dpop").length));
  return { name, outcome, bytes, isHead, isOnce, draft, signed, at: target };
}

// --- What may come back --------------------------------------------------------------------------

/** What is wrong with an answer, if anything. */
function problemOf(request: Hostile, answer: Answer, isAgain: boolean): string | undefined {
  const { status } = answer;
  const outcome = isAgain && request.isOnce ? "refused" : request.outcome;
  if (status === -1) return "no answer";
  // Bun itself hangs up on a method that it does not know, and says 505 to a malformed first line.
  const isKnown = /^(GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS|TRACE)$/.test(request.draft.method);
  if (status === 0) return isKnown ? "hung up without an answer" : undefined;
  if (status === 505 && !answer.body && outcome !== "ok") return undefined;
  if (status === 200) {
    if (outcome === "refused") return "accepted";
    if (request.isHead) return undefined;
    return request.at.signer ? wrongWithClaims(request, answer) : wrongWithToken(request, answer);
  }
  if (status < 400 || status > 499) return `status ${status}`;
  return outcome === "ok" ? `refused: ${status} ${answer.body}` : undefined;
}

/** Whether a JWT is signed with the key: worked out here, not by the code under test. */
function isSigned(jwt: string, jwk: jose.JWK): boolean {
  const [header, claims, signature = ""] = jwt.split(".");
  const key = createPublicKey({ key: jwk as Record<string, string>, format: "jwk" });
  const bytes = Buffer.from(signature, "base64url");
  const input = Buffer.from(`${header}.${claims}`);
  return verify("sha256", input, { key, dsaEncoding: "ieee-p1363" }, bytes);
}

const fieldsOf = (bytes: Buffer, name: string) =>
  bytes
    .toString("latin1")
    .split("\r\n\r\n", 1)[0]!
    .split("\r\n")
    .filter((line) => line.toLowerCase().startsWith(`${name}:`))
    .map((line) => line.slice(name.length + 1).trim());

/** Whether the bytes that were sent hold the credentials of the client, and once. */
function hasCredentials(request: Hostile): boolean {
  const { draft, signed } = request;
  const form = draft.form.map((entry) => entry.join("=")).join("&");
  const filled = form.replaceAll("{assertion}", signed["assertion"] ?? "");
  const parameters = new URLSearchParams(Buffer.from(filled, "latin1").toString());
  const only = (name: string) =>
    parameters.getAll(name).length === 1 ? parameters.get(name)! : undefined;
  if (draft.jwts.assertion) return isSigned(only("client_assertion") ?? "", own.app.jwk);
  const expected = [draft.client_id, secrets[draft.client_id]];
  const fields = fieldsOf(request.bytes, "authorization");
  if (!fields.length) {
    return Bun.deepEquals([only("client_id"), only("client_secret")], expected);
  }
  const [, encoded = ""] = /^Basic +(\S+)$/i.exec(fields.join()) ?? [];
  const [id = "", secret = ""] = Buffer.from(encoded, "base64").toString().split(":");
  const sent = [id, secret].map((text) => new URLSearchParams(`=${text}`).get(""));
  return Bun.deepEquals(sent, expected);
}

function wrongWithToken(request: Hostile, { body }: Answer): string | undefined {
  const { draft, outcome, at } = request;
  if (!hasCredentials(request)) return "a token without the credentials";
  const { access_token, token_type, ...rest } = JSON.parse(body);
  const claims = jose.decodeJwt(access_token);
  const { sub, client_id, scope, aud, iss, cnf } = claims as Record<string, any>;
  const members = { sub, client_id, iss, aud, scope: rest.scope, names: Object.keys(rest).join() };
  const named = { sub: draft.client_id, client_id: draft.client_id, iss: at.issuer };
  const wanted = { ...named, aud: at.resource, scope, names: "expires_in,scope" };
  if (!Bun.deepEquals(members, wanted))
    return `a token of something else: ${JSON.stringify(claims)}`;
  const scopes = `${scope}`.split(" ");
  const asked = outcome === "ok" ? draft.scopes : ["api1", "read"];
  const isGranted = scopes.every((name) => asked.includes(name));
  if (!isGranted || (outcome === "ok" && scopes.length !== asked.length)) return `scope ${scope}`;
  const isBound = token_type === "DPoP";
  if (cnf?.jkt !== (isBound ? proofThumbprint : undefined)) return "bound to another key";
  if (isBound && !fieldsOf(request.bytes, "dpop").some((proof) => isSigned(proof, proofJwk))) {
    return "bound without a proof";
  }
  const mustBind = draft.client_id === "bound" || (outcome === "ok" && draft.jwts.proof);
  return mustBind && !isBound ? "not bound" : undefined;
}

function wrongWithClaims(request: Hostile, { body }: Answer): string | undefined {
  const { draft, at } = request;
  const [field = "", ...others] = fieldsOf(request.bytes, "authorization");
  const [, scheme = "", token = ""] = /^(Bearer|DPoP) +(\S+)$/i.exec(field) ?? [];
  if (others.length || !isSigned(token, at.signer!.jwk)) return "accepted without a token";
  const isBound = "cnf" in draft.jwts.token!.claims;
  if (isBound !== /^dpop$/i.test(scheme)) return "accepted with the other scheme";
  if (isBound && !fieldsOf(request.bytes, "dpop").some((proof) => isSigned(proof, proofJwk))) {
    return "accepted without a proof";
  }
  const claims: { type: string; value: string }[] = JSON.parse(body);
  const isTheirs = claims.some(
    ({ type, value }) => type === "client_id" && value === draft.client_id,
  );
  return isTheirs ? undefined : "the claims of somebody else";
}

/** What became of many requests. */
export interface Tally {
  sent: number;
  accepted: number;
  refused: number;
  /** Kinds of bends, and how often each was used. */
  bends: Map<string, number>;
  /** Different answers to what was refused: status, header fields and body, without the date. */
  refusals: Map<string, number>;
  problems: string[];
}

/**
 * Sends `count` hostile requests over several connections. Some that were accepted are sent again,
 * to the byte. `during` is called every 1,000 requests.
 */
export async function attack(
  at: Target,
  seed: number,
  count: number,
  during: (sent: number) => void = () => {},
): Promise<Tally> {
  const tally: Tally = {
    sent: 0,
    accepted: 0,
    refused: 0,
    bends: new Map(),
    refusals: new Map(),
    problems: [],
  };
  const origin = at.signer ? at.resource : at.issuer;
  let index = 0;
  const judge = (request: Hostile, answer: Answer, which: number, isAgain: boolean) => {
    tally.sent += 1;
    tally[answer.status === 200 ? "accepted" : "refused"] += 1;
    if (tally.sent % 1_000 === 0) during(tally.sent);
    const count = (map: Map<string, number>, key: string) => map.set(key, (map.get(key) ?? 0) + 1);
    for (const name of request.name.split(" + ")) count(tally.bends, isAgain ? "again" : name);
    const { status, headers, body } = answer;
    if (status !== 200) {
      const fields = [...headers].filter(([name]) => name !== "date");
      count(tally.refusals, JSON.stringify([status, fields, body]));
    }
    const problem = problemOf(request, answer, isAgain);
    if (!problem || tally.problems.length >= 50) return;
    const sent = JSON.stringify(request.bytes.toString("latin1").slice(0, 3_000));
    const again = isAgain ? " (again)" : "";
    tally.problems.push(`${problem}: #${which}${again} of seed ${seed}: ${request.name}: ${sent}`);
  };
  const worker = async () => {
    let connection = await Connection.open(origin);
    while (index < count) {
      const which = index++;
      const request = hostileRequest(at, seed, which);
      for (const isAgain of [false, true]) {
        if (connection.closed) connection = await Connection.open(origin);
        const answer = await connection.send(request.bytes, request.isHead);
        if (answer.headers.get("connection") === "close" || answer.status < 1) connection.close();
        judge(request, answer, which, isAgain);
        if (answer.status !== 200 || which % 5 !== 0) break;
      }
    }
    connection.close();
  };
  await Promise.all(Array.from({ length: 16 }, worker));
  return tally;
}

// --- An issuer that misbehaves -------------------------------------------------------------------

const endless = () =>
  new Response(new ReadableStream({ pull: (stream) => stream.enqueue(Buffer.alloc(65_536, " ")) }));
/** 64 MiB of spaces in 64 kB. */
let bomb: Uint8Array<ArrayBuffer> | undefined;
const bombed = () => {
  bomb ??= Bun.gzipSync(Buffer.alloc(64 << 20, " "));
  return new Response(bomb, { headers: { "content-encoding": "gzip" } });
};
const junkKeys = [
  ...[null, 1, "x", [], {}, { kid: "a" }, { kty: "oct", k: "AAAA", kid: "b" }],
  ...[
    { kty: "EC", kid: "c" },
    { kty: "EC", crv: "P-256", x: "!!", y: [], kid: "d" },
  ],
  ...[
    { kty: ["RSA"], kid: {} },
    { kty: "RSA", n: "", e: 0, kid: "e" },
    { kty: "OKP", kid: "f" },
  ],
];

const zipped = async (answer: Response) =>
  new Response(Bun.gzipSync(await answer.arrayBuffer()), {
    headers: { "content-encoding": "gzip" },
  });

const strangerKey = { ...own.stranger.jwk, kid: "stranger", alg: "ES256" };

/** How it can answer instead of well. */
export const faults = {
  "500": () => new Response("no", { status: 500 }),
  garbage: () => new Response("<html>\0\xff"),
  "JSON cut off": () => new Response('{"issuer":"'),
  null: () => new Response("null"),
  "JSON nested 500,000 deep": () => new Response(nested(500_000)),
  "another issuer": (at: FakeIssuer, path: string) =>
    path === "/jwks" ? at.well(path, [strangerKey]) : at.metadata("https://other.example"),
  "a redirect to keys of a stranger": (at: FakeIssuer, path: string) => {
    if (!path.startsWith("/stranger")) return Response.redirect("/stranger");
    return path.endsWith("/jwks")
      ? at.well("/jwks", [strangerKey])
      : at.metadata(at.origin, "/stranger/jwks");
  },
  "jwks_uri of another kind": (at: FakeIssuer) =>
    Response.json({ issuer: at.origin, jwks_uri: "file:///etc/passwd" }),
  "no key": (at: FakeIssuer, path: string) => at.well(path, []),
  "only junk keys": (at: FakeIssuer, path: string) => at.well(path, [null, 1, {}, { kty: "oct" }]),
  "junk beside the keys": (at: FakeIssuer, path: string) => at.well(path, [...junkKeys, at.key]),
  "all is well, but compressed": (at: FakeIssuer, path: string) => zipped(at.well(path, [at.key])),
  "an endless body": endless,
  "64 MiB, compressed": bombed,
  silence: () => new Promise<Response>(() => {}),
};
export type Fault = keyof typeof faults;

/** Serves metadata and one key, or what the fault says. */
export class FakeIssuer {
  fault: Fault | undefined;
  /** Requests so far. */
  fetches = 0;
  readonly key: jose.JWK;
  readonly origin: string;
  #port = 0;
  #server: Bun.Server<undefined> | undefined;

  constructor({ jwk }: Pair) {
    this.key = { ...jwk, alg: "ES256" };
    this.start();
    this.origin = `http://127.0.0.1:${this.#port}`;
  }

  start(): void {
    this.#server = Bun.serve({
      hostname: "127.0.0.1",
      port: this.#port,
      fetch: (request) => {
        this.fetches += 1;
        const path = new URL(request.url).pathname;
        return this.fault ? faults[this.fault](this, path) : this.well(path, [this.key]);
      },
    });
    this.#port = this.#server.port!;
  }

  well(path: string, keys: unknown[]): Response {
    if (path === "/jwks") return Response.json({ keys });
    return this.metadata(this.origin);
  }

  metadata(issuer: string, jwks = "/jwks"): Response {
    return Response.json({ issuer, jwks_uri: `${this.origin}${jwks}` });
  }

  async stop(): Promise<void> {
    await this.#server?.stop(true);
  }
}
