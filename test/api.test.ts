/**
 * The API, RFC 6750, RFC 9068, RFC 9728: every answer, which tokens are valid, what it tells of
 * itself, and how it gets the issuer's keys. The issuer is a server of this file, which behaves as
 * each test says. Each row is one deviation from a valid call; the log tells which check refused.
 */

import { afterAll, beforeAll, describe, expect, mock, spyOn, test } from "bun:test";
import { createHmac } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import { lifecycle, resourceServer } from "../config.ts";
import {
  captureLog,
  cleanUp,
  eventually,
  exchange,
  freeOrigin,
  freePort,
  launch,
  signedJwt,
  temporaryDirectory,
  withinOneSecond,
  withModule,
} from "./support.ts";

type Api = typeof import("../api.ts");
type Refusal = InstanceType<Api["Refusal"]>;

const seconds = () => Math.floor(Date.now() / 1000);
const stops: (() => Promise<void>)[] = [];
const log = captureLog();
/** How many lines the calls so far make the servers log. */
let lines = 0;

afterAll(async () => {
  log.stop();
  await Promise.all(stops.map((stop) => stop()));
  await cleanUp();
});

// --- Keys and tokens -----------------------------------------------------------------------------

interface Key {
  alg: string;
  privateKey: CryptoKey;
  publicKey: CryptoKey;
  /** As the issuer publishes it. */
  jwk: jose.JWK & { kid: string };
}

async function newKey(kid: string, alg = "ES256"): Promise<Key> {
  const { privateKey, publicKey } = await jose.generateKeyPair(alg);
  return { alg, privateKey, publicKey, jwk: { ...(await jose.exportJWK(publicKey)), kid } };
}

const key = await newKey("key");
const secondKey = await newKey("second");
const rsa = await newKey("rsa", "RS256");
const es384 = await newKey("es384", "ES384");
const stranger = await newKey("key");

/** What differs from a valid token. A member that is undefined is left out. */
interface TokenDeviation {
  key?: Key;
  header?: Record<string, unknown>;
  claims?: Record<string, unknown>;
  /** Times in seconds from now. */
  exp?: number;
  nbf?: number;
  /** What is done to the finished token. */
  bend?: (token: string) => string;
}

let jtis = 0;

async function newToken(iss: string, aud: string, deviation: TokenDeviation = {}, now = seconds()) {
  const { key: signer = key, exp = 60, nbf, bend = (token: string) => token } = deviation;
  const header = { alg: signer.alg, kid: signer.jwk.kid, typ: "at+jwt", ...deviation.header };
  const claims = {
    iss,
    sub: "caller",
    aud,
    client_id: "caller",
    scope: "api1",
    iat: now,
    exp: now + exp,
    jti: `token ${(jtis += 1)}`,
    ...(nbf !== undefined && { nbf: now + nbf }),
    ...deviation.claims,
  };
  return bend(await signedJwt(header, claims, signer.privateKey));
}

const base64url = (text: string) => Buffer.from(text).toString("base64url");

// --- The issuer ----------------------------------------------------------------------------------

type Behaviour = () => Response | Promise<Response>;

/** An authorization server that answers as a test says, and counts what it is asked. */
class Issuer {
  readonly origin: string;
  readonly requests: string[] = [];
  keys: unknown[] = [key.jwk];
  metadata: Behaviour = () => Response.json(this.document());
  jwks: Behaviour = () => Response.json({ keys: this.keys });

  constructor(port = 0, tls?: Bun.TLSOptions) {
    const server = Bun.serve({
      hostname: "127.0.0.1",
      port,
      ...(tls && { tls }),
      fetch: ({ url }) => {
        const { pathname } = new URL(url);
        this.requests.push(pathname);
        if (pathname === "/.well-known/openid-configuration") return this.metadata();
        return pathname === "/jwks" ? this.jwks() : new Response("", { status: 404 });
      },
    });
    stops.push(() => server.stop(true));
    this.origin = server.url.origin;
  }

  document(changes: object = {}) {
    return { issuer: this.origin, jwks_uri: `${this.origin}/jwks`, ...changes };
  }

  /** Each fetch of the keys begins with the metadata. */
  get fetches(): number {
    return this.requests.filter((path) => path !== "/jwks").length;
  }
}

// --- The API -------------------------------------------------------------------------------------

interface Answer {
  status: number;
  headers: Record<string, string>;
  body: string;
  line: number;
}

async function call(url: string, headers: Record<string, string> = {}, method = "GET") {
  const response = await fetch(url, { method, headers });
  const { date, "content-length": length, ...rest } = response.headers.toJSON();
  if (response.status >= 400 && new URL(url).pathname === "/identity" && response.status !== 405) {
    lines += 1;
  }
  const answer = { status: response.status, headers: rest, body: await response.text() };
  return { ...answer, line: lines - 1 } as Answer;
}

/** The line that the log has for a refused call. */
async function lineOf({ line }: Answer): Promise<Record<string, unknown>> {
  await log.until(line + 1);
  return log.requests[line]!;
}

type Settings = Partial<typeof resourceServer>;

async function startApi(issuer: string, settings: Settings = {}) {
  const resource = freeOrigin();
  const changes = { resourceServer: { resource, issuer, ...settings } };
  const server = await withModule("api", changes, (module: Api) => module.start());
  stops.push(() => server.stop(true));
  const token = (deviation?: TokenDeviation) => newToken(issuer, resource, deviation);
  return {
    resource,
    server,
    token,
    get: (path: string) => call(resource + path),
    send: (token: string) => call(`${resource}/identity`, { authorization: `Bearer ${token}` }),
    /** Calls with a new token. */
    try: async (deviation?: TokenDeviation) =>
      call(`${resource}/identity`, { authorization: `Bearer ${await token(deviation)}` }),
  };
}

/** `authorize` of a module that listens nowhere, as a copier calls it. */
async function authorizer(issuer: string, settings: Settings = {}) {
  const resource = "https://api.example";
  const changes = { resourceServer: { resource, issuer, ...settings } };
  const { authorize, Refusal } = await withModule("api", changes, async (module: Api) => module);
  const request = (authorization: string) =>
    new Request("https://elsewhere.example/orders/7", { headers: { authorization } });
  return {
    authorize,
    Refusal,
    request,
    token: (deviation?: TokenDeviation, now?: number) => newToken(issuer, resource, deviation, now),
    /** What comes of a token: "accepted", or the code and the reason of the refusal. */
    outcome: async (token: string) => {
      try {
        await authorize(request(`Bearer ${token}`), "api1");
        return "accepted";
      } catch (error) {
        const { code, message } = error as Refusal;
        return `${code}: ${message}`;
      }
    },
  };
}

// --- The answers, byte for byte ------------------------------------------------------------------

const mainIssuer = new Issuer();
const forEncryption = { ...secondKey.jwk, kid: "enc", use: "enc" };
const otherAlg = { ...rsa.jwk, kid: "rs512", alg: "RS512" };
mainIssuer.keys = [key.jwk, rsa.jwk, es384.jwk, forEncryption, otherAlg];
const main = await startApi(mainIssuer.origin);
const identity = `${main.resource}/identity`;

const where = `resource_metadata="${main.resource}/.well-known/oauth-protected-resource"`;
const algs = `algs="${[
  ...["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
  ...["EdDSA", "Ed25519", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87"],
].join(" ")}"`;
const challenges = {
  none: () => `Bearer ${where}, DPoP ${algs}, ${where}`,
  Bearer: (why: string) => `Bearer ${why}, ${where}, DPoP ${algs}, ${where}`,
  DPoP: (why: string) => `Bearer ${where}, DPoP ${why}, ${algs}, ${where}`,
};

type Scheme = keyof typeof challenges;

const texts = {
  no_credentials: "An access token is needed.",
  invalid_request: "The Authorization field is malformed.",
  invalid_token: "The access token is not valid here. The log of the API has the reason.",
  insufficient_scope: "The access token lacks the scope.",
};
type Code = keyof typeof texts;
const statuses: Record<Code, number> = {
  no_credentials: 401,
  invalid_request: 400,
  invalid_token: 401,
  insufficient_scope: 403,
};
const plain = { "cache-control": "no-store", "content-type": "text/plain;charset=utf-8" };
const json = { "cache-control": "no-store", "content-type": "application/json" };

/** Compares the whole answer, and the whole line of the log. */
async function expectRefusal(
  answer: Answer,
  code: Code,
  details: Record<string, unknown>,
  scheme: Scheme = code === "no_credentials" ? "none" : "Bearer",
): Promise<void> {
  const { status, headers, body } = answer;
  expect(await lineOf(answer)).toEqual({
    time: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
    event: "call refused",
    address: "127.0.0.1",
    error: code,
    milliseconds: expect.any(Number),
    ...details,
  });
  const needed = code === "insufficient_scope" ? ', scope="api1"' : "";
  const why = `error="${code}", error_description="${texts[code]}"${needed}`;
  expect(headers).toEqual({ ...plain, "www-authenticate": challenges[scheme](why) });
  expect([status, body]).toEqual([statuses[code], texts[code]]);
}

const answers = new Map<object, Answer>();

describe("GET /identity", () => {
  const notWellFormed = "no well-formed access token";

  /** How the token is presented. */
  type Field = [rule: string, field: (token: string) => string | undefined];

  const accepted: Field[] = [
    ["RFC 6750 §2.1 a valid token", (token) => `Bearer ${token}`],
    ["RFC 9110 §11.1 the scheme in small letters", (token) => `bearer ${token}`],
    ["RFC 9110 §11.1 the scheme in capitals", (token) => `BEARER ${token}`],
    ["RFC 9110 §11.4 several spaces after the scheme", (token) => `Bearer   ${token}`],
  ];

  const anonymous: Field[] = [
    ["no Authorization field", () => undefined],
    ["an empty Authorization field", () => ""],
    ["another scheme", () => "Basic Y2xpZW50OnNlY3JldA=="],
    ["another scheme with the token", (token) => `Token ${token}`],
    ["a scheme that begins like Bearer", (token) => `Bearers ${token}`],
    ["a scheme that ends like Bearer", (token) => `XBearer ${token}`],
    ["no space after Bearer", (token) => `Bearer${token}`],
    ["a token without a scheme", (token) => token],
    ["another scheme with Bearer as its credentials", () => "Digest Bearer"],
  ];

  const presented: [...Field, scheme?: "DPoP"][] = [
    ["no token", () => "Bearer"],
    ["no token, small letters", () => "bearer"],
    ["no token, scheme DPoP", () => "DPoP", "DPoP"],
    ["no token, scheme dpop", () => "dpop", "DPoP"],
    ["a character outside b64token", (token) => `Bearer ${token}!`],
    ["a character outside b64token, scheme DPoP", (token) => `DPoP ${token}!`, "DPoP"],
    ["a letter beyond ASCII", (token) => `Bearer ${token}\u00e4`],
    ["= within the token", (token) => `Bearer a=${token}`],
    ["= alone", () => "Bearer ="],
    ["the token in quotes", (token) => `Bearer "${token}"`],
    ["two tokens", (token) => `Bearer ${token} ${token}`],
    ["a comma after the token", (token) => `Bearer ${token},`],
    ["parameters instead of a token", (token) => `Bearer token="${token}"`],
    ["two schemes", (token) => `Bearer ${token}, DPoP ${token}`],
    ["two schemes, DPoP first", (token) => `DPoP ${token}, Bearer ${token}`, "DPoP"],
    ["two schemes, the first unknown", (token) => `Basic eA==, Bearer ${token}`],
    ["two schemes, no space after the comma", (token) => `Basic eA==,Bearer ${token}`],
    ["two schemes, the second without a token", () => "Basic eA==, DPoP"],
  ];

  const malformed = presented.map(([rule, field, scheme = "Bearer"]) => {
    return [rule, field, scheme as Scheme] as const;
  });

  beforeAll(async () => {
    for (const [, field] of [...accepted, ...anonymous, ...malformed]) {
      const authorization = field(await main.token());
      const headers = authorization === undefined ? {} : { authorization };
      answers.set(field, await call(identity, headers as Record<string, string>));
    }
  });

  test.each(accepted)("%s → 200", (_, field) => {
    const { status, headers, body } = answers.get(field)!;
    expect(status).toBe(200);
    expect(headers).toEqual(json);
    expect(JSON.parse(body)).toContainEqual({ type: "client_id", value: "caller" });
  });

  test.each(anonymous)("RFC 6750 §3.1 %s → 401 without an error", async (_, field) => {
    await expectRefusal(answers.get(field)!, "no_credentials", { reason: notWellFormed });
  });

  test.each(malformed)("RFC 6750 §3.1 %s → 400 invalid_request", async (_, field, scheme) => {
    const answer = answers.get(field)!;
    await expectRefusal(answer, "invalid_request", { reason: notWellFormed }, scheme);
  });

  test.each([
    ["in the query", (token: string) => [`GET /identity?access_token=${token}`, ""]],
    ["in a form", (token: string) => ["GET /identity", `access_token=${token}`]],
    ["in a cookie", (token: string) => ["GET /identity", "", `Cookie: access_token=${token}`]],
  ])("RFC 6750 §2 the token %s → 401 without an error", async (_, request) => {
    const [line, body = "", field = "X: x"] = request(await main.token());
    const form = "Content-Type: application/x-www-form-urlencoded";
    const fields = [field, form, `Content-Length: ${body.length}`];
    const raw = await exchangeWith(line!, fields, body);
    lines += 1;
    expect(raw).toStartWith("HTTP/1.1 401 Unauthorized\r\n");
    expect(raw.toLowerCase()).toContain(`www-authenticate: ${challenges.none()}\r\n`.toLowerCase());
    expect(raw).toEndWith(`\r\n\r\n${texts.no_credentials}`);
  });

  test("RFC 6750 §2 another token in the query is not looked at → 200", async () => {
    const authorization = `Bearer ${await main.token()}`;
    const { status } = await call(`${identity}?access_token=x`, { authorization });
    expect(status).toBe(200);
  });

  test.each([
    ["Bearer and Bearer", (token: string) => [`Bearer ${token}`, `Bearer ${token}`], "Bearer"],
    ["Bearer and DPoP", (token: string) => [`Bearer ${token}`, `DPoP ${token}`], "Bearer"],
    ["DPoP and Bearer", (token: string) => [`DPoP ${token}`, `Bearer ${token}`], "DPoP"],
    ["Basic and Bearer", (token: string) => ["Basic eA==", `Bearer ${token}`], "Bearer"],
    ["Bearer and Basic", (token: string) => [`Bearer ${token}`, "Basic eA=="], "Bearer"],
  ] as const)(
    "RFC 6750 §3.1 two Authorization fields, %s → 400 invalid_request",
    async (_, fields, scheme) => {
      const both = fields(await main.token()).map((field) => `Authorization: ${field}`);
      const raw = await exchangeWith("GET /identity", both);
      lines += 1;
      expect(raw).toStartWith("HTTP/1.1 400 Bad Request\r\n");
      const why = `error="invalid_request", error_description="${texts.invalid_request}"`;
      expect(raw).toContain(`: ${challenges[scheme](why)}\r\n`);
      // The same line with one field, so that the second is what is refused.
      const one = `Authorization: Bearer ${await main.token()}`;
      expect(await exchangeWith("GET /identity", [one])).toStartWith("HTTP/1.1 200 OK\r\n");
    },
  );
});

/** Sends a request as it is, with a Host and Connection: close. */
const exchangeWith = (line: string, fields: string[] = [], body = "") =>
  exchange(
    main.resource,
    [`${line} HTTP/1.1`, "Host: api", "Connection: close", ...fields, "", body].join("\r\n"),
  );

// --- Which tokens are valid ----------------------------------------------------------------------

/** The token with another header or payload under its old signature. */
const withPart = (index: number, text: string) => (token: string) =>
  token.split(".").with(index, base64url(text)).join(".");

const headerOf = (alg: string, kid = "key") => JSON.stringify({ alg, kid, typ: "at+jwt" });
const withoutSignature = (token: string) => token.replace(/[^.]+$/, "");

/** The token signed with a symmetric key. */
const symmetric = (secret: string | Buffer) => (token: string) => {
  const input = `${base64url(headerOf("HS256", "rsa"))}.${token.split(".")[1]}`;
  return `${input}.${createHmac("sha256", secret).update(input).digest("base64url")}`;
};

/** A token whose payload is this text. */
async function signedText(payload: string): Promise<string> {
  const input = `${base64url(headerOf("ES256"))}.${base64url(payload)}`;
  const algorithm = { name: "ECDSA", hash: "SHA-256" };
  const signature = await crypto.subtle.sign(algorithm, key.privateKey, Buffer.from(input));
  return `${input}.${Buffer.from(signature).toString("base64url")}`;
}

const spki = await jose.exportSPKI(rsa.publicKey);
const der = Buffer.from(await crypto.subtle.exportKey("spki", rsa.publicKey));
const payloads = ["claims", '{"iss":"x"', "null", '"claims"', "[]"];
const signedTexts = await Promise.all(payloads.map(async (text) => [text, await signedText(text)]));

describe("GET /identity", () => {
  const { jwk } = stranger;
  const elsewhere = `${mainIssuer.origin}/elsewhere`;
  const aud = main.resource;
  const other = "https://other.example";

  const accepted: [rule: string, deviation: TokenDeviation][] = [
    ["RFC 9068 §4 a valid token", {}],
    ["RFC 9068 §4 typ application/at+jwt", { header: { typ: "application/at+jwt" } }],
    ["RFC 7515 §4.1.9 typ in other letters", { header: { typ: "Application/AT+JWT" } }],
    ["RFC 9068 §2.1 alg RS256", { key: rsa }],
    ["RFC 9068 §4 alg ES384", { key: es384 }],
    ["RFC 9068 §4 aud an array of this resource", { claims: { aud: [aud] } }],
    ["RFC 9068 §4 aud an array with this resource", { claims: { aud: [other, aud] } }],
    ["RFC 9068 §4 exp 29 s ago", { exp: -29 }],
    ["RFC 7519 §4.1.5 nbf 30 s ahead", { nbf: 30 }],
    ["RFC 7519 §4.1.5 nbf now", { nbf: 0 }],
    ["RFC 7515 §4.1.3 a foreign jwk in the header", { header: { jwk } }],
    ["RFC 7515 §4.1.2 jku in the header", { header: { jku: elsewhere } }],
    ["RFC 7515 §4.1.5 x5u in the header", { header: { x5u: elsewhere } }],
    ["RFC 7515 §4 an unknown member in the header", { header: { x: 1 } }],
    ["RFC 7519 §4.3 an unknown claim", { claims: { "urn:x": { cnf: 1 } } }],
    ["RFC 6749 §3.3 scope with others before and after", { claims: { scope: "a api1 b" } }],
    ["RFC 6749 §3.3 scope with itself", { claims: { scope: "api1 api1" } }],
    ["scope an array", { claims: { scope: ["api1"] } }],
    ["scope an array with others", { claims: { scope: ["a", "api1", "b"] } }],
  ];

  const notAllowed = '"alg" (Algorithm) Header Parameter value not allowed';
  const badSignature = "signature verification failed";
  const noKey = "no applicable key found in the JSON Web Key Set";
  const typ = 'unexpected "typ" JWT header value';
  const noName = "no sub, client_id or jti";
  const unknownWay = "bound in an unknown way";
  const invalidJws = "Invalid Compact JWS";
  const noObject = "JWT Claims Set must be a top-level JSON object";
  const missing = (claim: string) => `missing required "${claim}" claim`;
  const unexpected = (claim: string) => `unexpected "${claim}" claim value`;
  const noNumber = (claim: string) => `"${claim}" claim must be a number`;
  const untimely = (claim: string) => `"${claim}" claim timestamp check failed`;

  const iss = mainIssuer.origin;
  const bent = (bend: (token: string) => string): TokenDeviation => ({ bend });
  const header = (members: object): TokenDeviation => ({ header: { ...members } });
  const claims = (members: object): TokenDeviation => ({ claims: { ...members } });
  const alg = (name: string) => bent(withPart(0, headerOf(name)));

  type RefusedRow = [rule: string, deviation: TokenDeviation, reason: string];
  const refused: RefusedRow[] = [
    ["§4 no typ", header({ typ: undefined }), typ],
    ["§4 typ JWT", header({ typ: "JWT" }), typ],
    ["§4 typ jwt", header({ typ: "jwt" }), typ],
    ["§4 typ dpop+jwt", header({ typ: "dpop+jwt" }), typ],
    ["§4 typ application/jwt", header({ typ: "application/jwt" }), typ],
    ["§4 typ text/at+jwt", header({ typ: "text/at+jwt" }), typ],
    ["§4 typ an array", header({ typ: ["at+jwt"] }), typ],
    ["§4 alg none", bent((token) => withoutSignature(alg("none").bend!(token))), notAllowed],
    ["§4 alg NONE", bent((token) => withoutSignature(alg("NONE").bend!(token))), notAllowed],
    ["§4 alg none, with a signature", alg("none"), notAllowed],
    ["§4 alg unknown", alg("ES1024"), notAllowed],
    ["§4 alg of Object's prototype", alg("constructor"), notAllowed],
    ["§4 alg HS256 with the public key as secret, PEM", bent(symmetric(spki)), notAllowed],
    ["§4 alg HS256 with the public key as secret, DER", bent(symmetric(der)), notAllowed],
    [
      "§4 alg HS256 with the public key as secret, JWK",
      bent(symmetric(JSON.stringify(rsa.jwk))),
      notAllowed,
    ],
    ["§4 alg RS256 with an EC key", alg("RS256"), noKey],
    ["§4 alg other than that of the JWK", { key: rsa, header: { kid: "rs512" } }, noKey],
    ["§4 signed with another key", { key: stranger }, badSignature],
    ["§4 signed with the key in jwk", { key: stranger, header: { jwk } }, badSignature],
    ["§4 no signature", bent(withoutSignature), badSignature],
    ["§4 another payload", bent(withPart(1, '{"sub":"root"}')), badSignature],
    ["§4 no kid", header({ kid: undefined }), "no kid in the header"],
    ["§4 an empty kid", header({ kid: "" }), "no kid in the header"],
    ["§4 an unknown kid", header({ kid: "unknown" }), noKey],
    ["§4 kid of Object's prototype", header({ kid: "__proto__" }), noKey],
    ["§4 kid a number", header({ kid: 7 }), noKey],
    ["§4 a key for encryption", { key: secondKey, header: { kid: "enc" } }, noKey],
    ["§4 no iss", claims({ iss: undefined }), missing("iss")],
    ["§4 iss of another issuer", claims({ iss: other }), unexpected("iss")],
    ["§4 iss with a slash", claims({ iss: `${iss}/` }), unexpected("iss")],
    ["§4 iss in capitals", claims({ iss: iss.toUpperCase() }), unexpected("iss")],
    ["§4 iss an array", claims({ iss: [iss] }), unexpected("iss")],
    ["§4 no aud", claims({ aud: undefined }), missing("aud")],
    ["§4 aud of another resource", claims({ aud: other }), unexpected("aud")],
    ["§4 aud with a slash", claims({ aud: `${aud}/` }), unexpected("aud")],
    ["§4 aud a part of this resource", claims({ aud: aud.slice(0, -1) }), unexpected("aud")],
    ["§4 aud the client_id", claims({ aud: "caller" }), unexpected("aud")],
    ["§4 aud an array without this resource", claims({ aud: [other] }), unexpected("aud")],
    ["§4 aud an empty array", claims({ aud: [] }), unexpected("aud")],
    ["§4 aud an object", claims({ aud: { [aud]: aud } }), unexpected("aud")],
    ["§4 no exp", claims({ exp: undefined }), missing("exp")],
    ["§4 exp 30 s ago", { exp: -30 }, untimely("exp")],
    ["§4 exp a string", claims({ exp: "4102444800" }), noNumber("exp")],
    ["§4 exp null", claims({ exp: null }), noNumber("exp")],
    ["§2.2 no iat", claims({ iat: undefined }), missing("iat")],
    ["§2.2 iat a string", claims({ iat: "0" }), noNumber("iat")],
    ["§2.2 iat null", claims({ iat: null }), noNumber("iat")],
    ["RFC 7519 §4.1.5 nbf 31 s ahead", { nbf: 31 }, untimely("nbf")],
    ["RFC 7519 §4.1.5 nbf a string", claims({ nbf: "0" }), noNumber("nbf")],
    ...["sub", "client_id", "jti"].flatMap((claim): RefusedRow[] => [
      [`§2.2 no ${claim}`, claims({ [claim]: undefined }), noName],
      [`§2.2 an empty ${claim}`, claims({ [claim]: "" }), noName],
      [`§2.2 ${claim} a number`, claims({ [claim]: 7 }), noName],
      [`§2.2 ${claim} null`, claims({ [claim]: null }), noName],
      [`§2.2 ${claim} an array`, claims({ [claim]: ["caller"] }), noName],
    ]),
    [
      "RFC 7515 §4.1.11 crit with an unknown name",
      header({ crit: ["x"], x: 1 }),
      'Extension Header Parameter "x" is not recognized',
    ],
    ["RFC 7515 §4.1.11 crit with b64", header({ crit: ["b64"], b64: true }), "crit in the header"],
    ["RFC 7800 §3 bound in an unknown way", claims({ cnf: { kid: "x" } }), unknownWay],
    ["RFC 7519 §7.2 no JWT", bent(() => "token"), invalidJws],
    ["RFC 7519 §7.2 two parts", bent((token) => token.replace(/\.[^.]+$/, "")), invalidJws],
    ["RFC 7519 §7.2 five parts, as of a JWE", bent((token) => `${token}.AA.AA`), invalidJws],
    ...signedTexts.map(([text, token]): RefusedRow => {
      return [`RFC 7519 §7.2 the claims ${text}`, bent(() => token!), noObject];
    }),
    ...["header", "[]", "null", '"header"'].map((text): RefusedRow => {
      const reason = "JWS Protected Header is invalid";
      return [`RFC 7519 §7.2 the header ${text}`, bent(withPart(0, text)), reason];
    }),
  ];

  const withoutScope: [rule: string, scope: unknown][] = [
    ["no scope", undefined],
    ["an empty scope", ""],
    ["another scope", "api2"],
    ["a scope that begins with it", "api10"],
    ["a scope that ends with it", "my-api1"],
    ["it in capitals", "API1"],
    ["scopes with a comma between", "api1,api2"],
    ["scopes with a tab between", "api1\tapi2"],
    ["an empty array", []],
    ["an array of another scope", ["api2"]],
    ["an array with both in one word", ["api1 api2"]],
    ["an array in an array", [["api1"]]],
    ["an object", { api1: "api1" }],
    ["null", null],
    ["true", true],
  ];
  const insufficient = withoutScope.map(([rule, scope]) => {
    return [rule, { scope, jti: `jti of ${rule}` }] as const;
  });
  /** The answers to one token that was sent twice. */
  const again = new Map<object, Answer[]>();

  async function send(deviation: TokenDeviation): Promise<Answer> {
    const run = async (now: number) =>
      main.send(await newToken(mainIssuer.origin, main.resource, deviation, now));
    const timed = deviation.exp ?? deviation.nbf;
    return await (timed === undefined ? run(seconds()) : withinOneSecond(run));
  }

  beforeAll(async () => {
    for (const [, row] of [...accepted, ...refused]) answers.set(row, await send(row));
    for (const [, row] of insufficient) {
      const token = await main.token({ claims: row });
      again.set(row, [await main.send(token), await main.send(token)]);
    }
  });

  test.each(accepted)("%s → 200", (_, deviation) => {
    const { status, headers, body } = answers.get(deviation)!;
    expect([status, headers]).toEqual([200, json]);
    expect(JSON.parse(body)).toContainEqual({ type: "sub", value: "caller" });
  });

  test.each(refused.map(([rule, ...row]) => [rule.replace(/^§/, "RFC 9068 §"), ...row] as const))(
    "%s → 401 invalid_token",
    async (_, deviation, reason) => {
      await expectRefusal(answers.get(deviation)!, "invalid_token", { reason });
    },
  );

  test("RFC 9068 §4 alg that acceptedAlgorithms does not have → 401 invalid_token", async () => {
    const { try: attempt } = await startApi(iss, { acceptedAlgorithms: ["RS256"] });
    const answer = await attempt();
    expect(await lineOf(answer)).toMatchObject({ error: "invalid_token", reason: notAllowed });
    expect(answer.headers["www-authenticate"]).toContain(', DPoP algs="RS256", ');
    expect([answer.status, (await attempt({ key: rsa })).status]).toEqual([401, 200]);
  });

  test("RFC 7515 §4.1 nothing that a header names is fetched", () => {
    expect(mainIssuer.requests).not.toContain("/elsewhere");
  });

  test.each(insufficient)(
    "RFC 6750 §3.1 scope: %s → 403 insufficient_scope, once and again",
    async (_, row) => {
      const details = { scope: "api1", client_id: "caller", jti: row.jti };
      for (const answer of again.get(row)!) {
        await expectRefusal(answer, "insufficient_scope", {
          reason: "not in the token",
          ...details,
        });
      }
    },
  );

  test("RFC 9449 §7.2 the error stands in the challenge of the scheme that was used", async () => {
    const authorization = `dpop ${await main.token()}`;
    const started = performance.now();
    const answer = await call(identity, { authorization });
    const ended = performance.now();
    await expectRefusal(answer, "invalid_token", { reason: "the other scheme" }, "DPoP");
    const { milliseconds } = await lineOf(answer);
    expect(milliseconds).toBeWithin(0, Math.ceil(ended - started) + 1);
  });

  test("the reason in the log is cut at 2,000 characters, and forges no line", async () => {
    const name = `${'"}\n{"event":"forged"}\n'.repeat(100)}${"x".repeat(2_000)}`;
    const answer = await main.try({ header: { crit: [name] } });
    expect(answer.status).toBe(401);
    const { reason, event } = await lineOf(answer);
    expect(`${reason}`).toHaveLength(2_000);
    expect(reason).toStartWith('Extension Header Parameter ""}\n{"event"');
    expect(event).toBe("call refused");
    expect(log.text()).not.toMatch(/^\{"event":"forged"/m);
  });

  test("no token is ever logged", async () => {
    const token = await main.token({ claims: { aud: other } });
    await main.send(token);
    await lineOf(await call(identity, { authorization: `Bearer ${token} ${token}` }));
    for (const part of token.split(".").slice(1)) expect(log.text()).not.toContain(part);
    expect(log.text()).not.toMatch(/Bearer|eyJ/);
  });
});

// --- What the API tells --------------------------------------------------------------------------

describe("GET /identity", () => {
  test("the claims in their order, each value a string", async () => {
    const now = seconds();
    const token = await main.token({
      claims: {
        iat: now,
        exp: now + 60,
        jti: "shown",
        scope: ["a", "api1"],
        number: 1.5,
        negative: -7,
        large: 9_007_199_254_740_991,
        yes: true,
        nothing: null,
        text: 'a "quoted"\n\u00e4\u{1f511}',
        empty: "",
        roles: ["reader", 7, false, null, { of: "all" }, ["nested", ["twice"]]],
        none: [],
        address: { country: "NL", lines: ["a", "b"] },
        ["__proto__"]: "own",
      },
    });
    const first = await main.send(token);
    expect(first.status).toBe(200);
    expect(JSON.parse(first.body)).toEqual([
      { type: "iss", value: mainIssuer.origin },
      { type: "sub", value: "caller" },
      { type: "aud", value: main.resource },
      { type: "client_id", value: "caller" },
      { type: "scope", value: "a" },
      { type: "scope", value: "api1" },
      { type: "iat", value: `${now}` },
      { type: "exp", value: `${now + 60}` },
      { type: "jti", value: "shown" },
      { type: "number", value: "1.5" },
      { type: "negative", value: "-7" },
      { type: "large", value: "9007199254740991" },
      { type: "yes", value: "true" },
      { type: "nothing", value: "null" },
      { type: "text", value: 'a "quoted"\n\u00e4\u{1f511}' },
      { type: "empty", value: "" },
      { type: "roles", value: "reader" },
      { type: "roles", value: "7" },
      { type: "roles", value: "false" },
      { type: "roles", value: "null" },
      { type: "roles", value: '{"of":"all"}' },
      { type: "roles", value: '["nested",["twice"]]' },
      { type: "address", value: '{"country":"NL","lines":["a","b"]}' },
      { type: "__proto__", value: "own" },
    ]);
    // Whether the token is validated or remembered.
    for (const again of [await main.send(token), await main.send(token)]) {
      expect([again.status, again.headers, again.body]).toEqual([200, json, first.body]);
    }
  });

  test("the answer to a remembered token is not written anew", async () => {
    const token = await main.token();
    const [first, second] = [await main.send(token), await main.send(token)];
    const spy = spyOn(JSON, "stringify");
    const third = await main.send(token);
    const { length } = spy.mock.calls;
    spy.mockRestore();
    expect([second.body, third.body, length]).toEqual([first.body, first.body, 0]);
  });

  test("each caller sees the claims of the token that came", async () => {
    const subjects = ["one", "two", "three", "one", "two", "three"];
    const tokens = await Promise.all(subjects.map((sub) => main.token({ claims: { sub } })));
    for (const _ of [1, 2]) {
      const sent = await Promise.all(tokens.map((token) => main.send(token)));
      const seen = sent.map(({ body }) => JSON.parse(body)[1].value);
      expect(seen).toEqual(subjects);
    }
  });

  test("an unexpected failure → 500, a constant text, the cause in the log", async () => {
    const token = await main.token();
    const { stringify } = JSON;
    const spy = spyOn(JSON, "stringify").mockImplementation(((value: unknown) => {
      if (Array.isArray(value)) throw new Error("the disk at /var/lib is on fire");
      return stringify(value);
    }) as typeof stringify);
    const answer = await main.send(token).finally(() => spy.mockRestore());
    expect([answer.status, answer.body]).toEqual([500, "Internal Server Error"]);
    expect(answer.headers).not.toHaveProperty("www-authenticate");
    const { error, reason } = await lineOf(answer);
    expect(error).toBe("server_error");
    expect(reason).toMatch(/^Error: the disk at \/var\/lib is on fire\n? +at /);
    expect((await main.send(token)).status).toBe(200);
  });
});

describe("GET /.well-known/oauth-protected-resource", () => {
  const path = "/.well-known/oauth-protected-resource";

  test("RFC 9728 §2 the metadata → 200", async () => {
    const { status, headers, body } = await main.get(path);
    expect([status, headers]).toEqual([200, json]);
    expect(JSON.parse(body)).toEqual({
      resource: main.resource,
      resource_name: "My API",
      authorization_servers: [mainIssuer.origin],
      scopes_supported: ["api1"],
      bearer_methods_supported: ["header"],
      dpop_signing_alg_values_supported: algs.slice(6, -1).split(" "),
    });
  });

  test("RFC 9728 §2 what is configured is what is told", async () => {
    const [resource, issuer] = [freeOrigin(), "https://issuer.example"];
    const settings = { resource, issuer, resource_name: "Orders", acceptedAlgorithms: ["RS256"] };
    const ask = async (module: Api) => {
      const server = await module.start();
      stops.push(() => server.stop(true));
      return await call(resource + path);
    };
    const { body } = await withModule("api", { resourceServer: settings }, ask);
    expect(JSON.parse(body)).toMatchObject({
      resource,
      resource_name: "Orders",
      authorization_servers: [issuer],
      dpop_signing_alg_values_supported: ["RS256"],
    });
  });

  test("RFC 9728 §5.1 it is where the challenge says", async () => {
    const { headers } = await call(identity);
    const [, url] = /resource_metadata="([^"]+)"/.exec(headers["www-authenticate"]!)!;
    expect((await call(url!)).body).toBe((await main.get(path)).body);
  });
});

describe("GET /health", () => {
  const unavailable = [503, '{"status":"unavailable"}'];

  test("without keys → 503, and they are fetched; with keys → 200", async () => {
    const issuer = new Issuer();
    const { promise: held, resolve: release } = Promise.withResolvers<void>();
    issuer.jwks = () => held.then(() => Response.json({ keys: issuer.keys }));
    const api = await startApi(issuer.origin, { coolDownSeconds: 0 });
    const first = await api.get("/health");
    expect([first.status, first.body]).toEqual(unavailable);
    expect(first.headers).toMatchObject({ "content-type": "application/json" });
    await eventually("the keys are asked for", () => issuer.requests.includes("/jwks"));
    release();
    const last = await eventually("200", async () => {
      const answer = await api.get("/health");
      return answer.status === 200 ? answer : undefined;
    });
    expect([last.headers, last.body]).toEqual([json, '{"status":"ok"}']);
    // Once there are keys, it asks for nothing.
    const { fetches } = issuer;
    for (let n = 0; n < 3; n++) expect((await api.get("/health")).status).toBe(200);
    expect(issuer.fetches).toBe(fetches);
  });

  test("the issuer away → 503, and the server goes on", async () => {
    const api = await startApi(freeOrigin(), { coolDownSeconds: 0 });
    for (let n = 0; n < 3; n++) {
      const { status, body } = await api.get("/health");
      expect([status, body]).toEqual(unavailable);
    }
  });

  test("while stopping → 503 and Connection: close, as on every answer", async () => {
    const before = await main.get("/health");
    expect([before.status, before.body]).toEqual([200, '{"status":"ok"}']);
    expect(before.headers).not.toHaveProperty("connection");
    lifecycle.stopping = true;
    try {
      const { status, headers, body } = await main.get("/health");
      expect([status, body]).toEqual(unavailable);
      expect(headers["connection"]).toBe("close");
      const served = [await main.try(), await call(identity), await main.get("/nothing")];
      const seen = served.map(({ status, headers }) => [status, headers["connection"]]);
      expect(seen).toEqual([
        [200, "close"],
        [401, "close"],
        [404, "close"],
      ]);
    } finally {
      lifecycle.stopping = false;
    }
    // The field was of those answers alone.
    expect((await main.try()).headers).toEqual(json);
  });
});

describe("routes", () => {
  const documents = ["/identity", "/.well-known/oauth-protected-resource", "/health"];

  test.each(documents)("HEAD %s → as GET, without a body", async (path) => {
    const authorization = `Bearer ${await main.token()}`;
    const head = await fetch(main.resource + path, { method: "HEAD", headers: { authorization } });
    const get = await fetch(main.resource + path, { headers: { authorization } });
    const [sent, body] = [await head.text(), await get.text()];
    expect([head.status, sent]).toEqual([200, ""]);
    expect(head.headers.get("content-type")).toBe("application/json");
    expect(head.headers.get("content-length")).toBe(`${body.length}`);
  });

  test("HEAD /identity without a token → 401 with the challenges, without a body", async () => {
    const { status, headers, body } = await call(identity, {}, "HEAD");
    expect([status, body]).toEqual([401, ""]);
    expect(headers["www-authenticate"]).toBe(challenges.none());
  });

  test.each(
    documents.flatMap((path) =>
      ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"].map((method) => [method, path] as const),
    ),
  )("RFC 9110 §15.5.6 %s %s → 405 with Allow", async (method, path) => {
    const { status, headers, body } = await call(main.resource + path, {}, method);
    expect([status, body]).toEqual([405, "Method Not Allowed"]);
    expect(headers).toEqual({ ...plain, allow: "GET, HEAD" });
  });

  test.each([
    "/",
    "/identity/",
    "/Identity",
    "/identity.json",
    "/%69dentity",
    "/.well-known/oauth-protected-resource/identity",
    "/.well-known/openid-configuration",
    "/__proto__",
  ])("RFC 9110 §15.5.5 GET %s → 404", async (path) => {
    const { status, headers, body } = await main.get(path);
    expect([status, headers, body]).toEqual([404, plain, "Not Found"]);
  });

  test("POST elsewhere → 404", async () => {
    const { status, headers } = await call(`${main.resource}/token`, {}, "POST");
    expect([status, headers]).toEqual([404, plain]);
  });

  test.each([
    ["16,384 bytes", 16_384, 405],
    ["16,385 bytes", 16_385, 413],
  ])("a body of %s → %d %d", async (_, size, status) => {
    const body = "x".repeat(size);
    expect((await fetch(identity, { method: "POST", body })).status).toBe(status);
  });

  const close = "Connection: close\r\n\r\n";
  test.each([
    ["HTTP/1.0 without Host", "GET /health HTTP/1.0\r\n\r\n", "200 OK"],
    ["HTTP/1.0 with a query", "GET /health?x=/y#z HTTP/1.0\r\n\r\n", "200 OK"],
    ["HTTP/1.0, no token", "GET /identity HTTP/1.0\r\n\r\n", "401 Unauthorized"],
    ["HTTP/1.0 elsewhere", "GET /x HTTP/1.0\r\n\r\n", "404 Not Found"],
    ["a whole URL", `GET http://other.example/health HTTP/1.1\r\nHost: a\r\n${close}`, "200 OK"],
    ["a whole https URL", `GET https://a/health HTTP/1.1\r\nHost: a\r\n${close}`, "200 OK"],
    ["a URL in capitals", `GET HTTP://A/health HTTP/1.1\r\nHost: a\r\n${close}`, "200 OK"],
    ["two slashes", `GET //health HTTP/1.1\r\nHost: a\r\n${close}`, "404 Not Found"],
    ["a query alone", `GET /?/health HTTP/1.1\r\nHost: a\r\n${close}`, "404 Not Found"],
    ["an odd Host", `GET /health HTTP/1.1\r\nHost: a b/[\r\n${close}`, "200 OK"],
    ["a Host with a path", `GET /health HTTP/1.1\r\nHost: a/x?\r\n${close}`, "200 OK"],
    ["an empty Host", `GET /health HTTP/1.1\r\nHost:\r\n${close}`, "200 OK"],
    ["no Host", `GET /health HTTP/1.1\r\n${close}`, "400 Bad Request"],
    ["CONNECT", `CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n${close}`, "404 Not Found"],
    ["OPTIONS *", `OPTIONS * HTTP/1.1\r\nHost: a\r\n${close}`, "400 Bad Request"],
    ["no slash", `GET health HTTP/1.1\r\nHost: a\r\n${close}`, "400 Bad Request"],
  ])("a raw request: %s → %3$s", async (_, request, status) => {
    if (request.includes("/identity")) lines += 1;
    expect(await exchange(main.resource, request)).toStartWith(`HTTP/1.1 ${status}\r\n`);
  });
});

describe("start", () => {
  const bare = "must be a bare https origin (http on loopback only), not";
  const listen = "https://api.example needs TLS_CERT and TLS_KEY, or API_LISTEN behind a proxy";

  test.each<[name: string, settings: Settings, message: string]>([
    ["ISSUER with a path", { issuer: "https://a.example/x" }, `ISSUER ${bare} https://a.example/x`],
    ["ISSUER with http", { issuer: "http://a.example" }, `ISSUER ${bare} http://a.example`],
    ["API_URL with http", { resource: "http://a.example" }, `API_URL ${bare} http://a.example`],
    ["API_URL with a slash", { resource: "http://[::1]/" }, `API_URL ${bare} http://[::1]/`],
    ["a public API_URL without a certificate", { resource: "https://api.example" }, listen],
  ])("%s → an error that names it", async (_, settings, message) => {
    const resourceServer = { issuer: mainIssuer.origin, resource: freeOrigin(), ...settings };
    const starting = withModule("api", { resourceServer }, async (module: Api) => {
      await (await module.start()).stop(true);
    });
    expect(await starting.catch((error) => error.message)).toBe(message);
  });

  test("errors are never shown with their source", () => {
    expect(main.server.development).toBe(false);
  });
});

// --- Keys of the issuer --------------------------------------------------------------------------

const megabyte = 1_048_576;
const noKey = "invalid_token: no applicable key found in the JSON Web Key Set";
const down = "temporarily_unavailable: status 500";
const status500 = () => new Response("", { status: 500 });

/** A document of so many bytes, with spaces at its end. */
const padded = (document: object, bytes: number) => {
  const text = JSON.stringify(document);
  return new Response(text + " ".repeat(bytes - Buffer.byteLength(text)));
};

/** Sends spaces for as long as somebody reads. */
const endless = () => {
  const chunk = new Uint8Array(65_536).fill(0x20);
  return new Response(new ReadableStream({ pull: (controller) => controller.enqueue(chunk) }));
};

/** Sends one space, and then nothing. */
const stalled = () =>
  new Response(new ReadableStream({ start: (controller) => controller.enqueue(" ") }));

type Bend = (issuer: Issuer) => void;
const metadata = (changes: object) => (issuer: Issuer) => {
  issuer.metadata = () => Response.json(issuer.document(changes));
};
const published = (keys: unknown[]) => (issuer: Issuer) => void (issuer.keys = keys);

/** What the two documents together may have. */
const sizes =
  (metadataBytes: number, totalBytes: number, more = {}) =>
  (issuer: Issuer) => {
    issuer.metadata = () => padded(issuer.document(more), metadataBytes);
    issuer.jwks = () => padded({ keys: issuer.keys }, totalBytes - metadataBytes);
  };

describe("a fetch of the keys", () => {
  const withKid = (members: object) => ({ ...secondKey.jwk, kid: "junk", ...members });
  const junk: [name: string, member: unknown][] = [
    ["null", null],
    ["a string", "key"],
    ["a number", 7],
    ["an array", [key.jwk]],
    ["an empty object", {}],
    ["a key without kid", withKid({ kid: undefined })],
    ["a key with an empty kid", withKid({ kid: "" })],
    ["a key whose kid is a number", withKid({ kid: 7 })],
    ["a key without kty", withKid({ kty: undefined })],
    ["a key of an unknown kty", withKid({ kty: "ECX" })],
    ["a key of another unknown kty", withKid({ kty: "XEC" })],
    ["a symmetric key", { kty: "oct", kid: "key", k: "AAAA" }],
  ];

  const accepted: [name: string, bend: Bend][] = [
    ["a valid JWK Set", () => {}],
    ["metadata with unknown members", metadata({ x: { jwks_uri: "x" } })],
    [
      "a JWK Set with an unknown member",
      (issuer) => (issuer.jwks = () => Response.json({ keys: issuer.keys, x: 1 })),
    ],
    [
      "a jwks_uri of another origin",
      (issuer) => metadata({ jwks_uri: `${new Issuer().origin}/jwks` })(issuer),
    ],
    ["metadata and JWK Set of 1 MiB together", sizes(700_000, megabyte)],
    ["small metadata, the rest of 1 MiB the JWK Set", sizes(1_000, megabyte)],
    [
      "other content types",
      (issuer) => (issuer.jwks = () => new Response(JSON.stringify({ keys: issuer.keys }))),
    ],
    ...junk.map(([name, member]): (typeof accepted)[number] => [
      `a JWK Set with ${name}, before and after the key`,
      published([member, key.jwk, member]),
    ]),
    ["a JWK Set with a broken key", published([{ kty: "EC", kid: "broken" }, key.jwk])],
    ["a JWK Set with odd key_ops", published([withKid({ key_ops: "verify" }), key.jwk])],
    ["a JWK Set with an RSA key of the same kid", published([{ ...rsa.jwk, kid: "key" }, key.jwk])],
    [
      "a JWK Set with a key for encryption",
      published([withKid({ use: "enc", kid: "key" }), key.jwk]),
    ],
    ["a key with use and alg", published([{ ...key.jwk, use: "sig", alg: "ES256" }])],
  ];

  const all = [201, 203, 404, 500, 503];
  const redirects = [301, 302, 303, 307, 308];
  const elsewhere = { location: "/elsewhere" };
  const noUsableKey = "no usable key in the JWK Set";
  const tooLong = (bytes: number) => `the answer is longer than ${bytes} bytes`;

  const failures: [name: string, bend: Bend, reason: string][] = [
    ...[...all, ...redirects].flatMap((status): typeof failures => [
      [
        `metadata with status ${status}`,
        (issuer) => {
          issuer.metadata = () => Response.json(issuer.document(), { status, headers: elsewhere });
        },
        `status ${status}`,
      ],
      [
        `a JWK Set with status ${status}`,
        (issuer) => {
          issuer.jwks = () => Response.json({ keys: issuer.keys }, { status, headers: elsewhere });
        },
        `status ${status}`,
      ],
    ]),
    [
      "metadata of another issuer",
      metadata({ issuer: "https://other.example" }),
      "metadata of another issuer",
    ],
    ["metadata without issuer", metadata({ issuer: undefined }), "metadata of another issuer"],
    [
      "metadata whose issuer has a slash at its end",
      (issuer) => metadata({ issuer: `${issuer.origin}/` })(issuer),
      "metadata of another issuer",
    ],
    [
      "metadata whose issuer is an array",
      (issuer) => metadata({ issuer: [issuer.origin] })(issuer),
      "metadata of another issuer",
    ],
    ["metadata without jwks_uri", metadata({ jwks_uri: undefined }), ""],
    ["metadata whose jwks_uri is a number", metadata({ jwks_uri: 7 }), ""],
    ["metadata whose jwks_uri is a path", metadata({ jwks_uri: "/jwks" }), ""],
    [
      "metadata whose jwks_uri is http on a host that is not loopback",
      (issuer) =>
        metadata({ jwks_uri: issuer.document().jwks_uri.replace("127.0.0.1", "0.0.0.0") })(issuer),
      "jwks_uri must be a bare https origin (http on loopback only), not http://0.0.0.0:",
    ],
    [
      "metadata whose jwks_uri is a data: URL",
      metadata({ jwks_uri: `data:application/json,${JSON.stringify({ keys: [key.jwk] })}` }),
      "jwks_uri must be a bare https origin (http on loopback only), not null",
    ],
    [
      "metadata whose jwks_uri is a file",
      metadata({ jwks_uri: `file://${jwksFile()}` }),
      "jwks_uri must be",
    ],
    ...["", "{", "null", "[]", '"metadata"', "7"].map((text): (typeof failures)[number] => [
      `metadata that are ${text || "nothing"}`,
      (issuer) => (issuer.metadata = () => new Response(text)),
      "",
    ]),
    ...["", "{", "null", "[]", "7", "{}", '{"keys":null}', '{"keys":{}}', '{"keys":"x"}'].map(
      (text): (typeof failures)[number] => [
        `a JWK Set that is ${text || "nothing"}`,
        (issuer) => (issuer.jwks = () => new Response(text)),
        "",
      ],
    ),
    ["an empty JWK Set", published([]), noUsableKey],
    ...junk.map(([name, member]): (typeof failures)[number] => [
      `a JWK Set of ${name} alone`,
      published([member]),
      noUsableKey,
    ]),
    ["endless metadata", (issuer) => (issuer.metadata = endless), tooLong(megabyte)],
    ["an endless JWK Set", (issuer) => (issuer.jwks = endless), "the answer is longer than "],
    ["metadata of more than 1 MiB", sizes(megabyte + 1, megabyte + 2_000), tooLong(megabyte)],
    [
      "metadata and JWK Set of a byte more than 1 MiB together",
      sizes(700_000, megabyte + 1),
      tooLong(megabyte - 700_000),
    ],
    [
      "small metadata, the JWK Set a byte too long",
      sizes(1_000, megabyte + 1),
      tooLong(megabyte - 1_000),
    ],
    [
      "more than 1 MiB together, in letters of several bytes",
      sizes(700_000, megabyte + 1, { x: "\u20ac".repeat(200_000) }),
      tooLong(megabyte - 700_000),
    ],
    [
      "a JWK Set in gzip, which is not unpacked",
      (issuer) => {
        const packed = Bun.gzipSync(JSON.stringify({ keys: issuer.keys }));
        issuer.jwks = () => new Response(packed, { headers: { "content-encoding": "gzip" } });
      },
      "JSON Parse error",
    ],
    [
      "an issuer that hangs up",
      (issuer) => metadata({ jwks_uri: `http://127.0.0.1:${hangingUp()}/jwks` })(issuer),
      "",
    ],
  ];

  test.each(accepted)("%s → the token is accepted", async (_, bend) => {
    const issuer = new Issuer();
    bend(issuer);
    const { outcome, token } = await authorizer(issuer.origin);
    expect(await outcome(await token())).toBe("accepted");
  });

  test.each(failures)("%s → temporarily_unavailable", async (_, bend, reason) => {
    const issuer = new Issuer();
    const { metadata, jwks, keys } = issuer;
    bend(issuer);
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    expect(await outcome(await token())).toStartWith(`temporarily_unavailable: ${reason}`);
    expect(issuer.requests).not.toContain("/elsewhere");
    if (reason.startsWith("jwks_uri")) expect(issuer.requests).not.toContain("/jwks");
    // Mended, the same token is accepted.
    Object.assign(issuer, { metadata, jwks, keys });
    expect(await outcome(await token())).toBe("accepted");
  });

  const slow: [name: string, bend: Bend][] = [
    ["metadata that stall", (issuer) => (issuer.metadata = stalled)],
    ["a JWK Set that stalls", (issuer) => (issuer.jwks = stalled)],
    [
      "metadata after 3 s, the JWK Set after 3 s more",
      (issuer) => {
        const { metadata, jwks } = issuer;
        issuer.metadata = () => Bun.sleep(3_000 / scale).then(metadata);
        issuer.jwks = () => Bun.sleep(3_000 / scale).then(jwks);
      },
    ],
  ];
  /** How much faster the deadline of 5 s passes here. */
  const scale = 25;

  test.each(slow)("%s → temporarily_unavailable after 5 s in all", async (_, bend) => {
    const issuer = new Issuer();
    bend(issuer);
    const { outcome, token } = await authorizer(issuer.origin);
    const { timeout } = AbortSignal;
    const spy = spyOn(AbortSignal, "timeout").mockImplementation((ms) => {
      return timeout.call(AbortSignal, ms / scale);
    });
    const result = await outcome(await token());
    const calls = [...spy.mock.calls];
    spy.mockRestore();
    expect(result).toMatch(/^temporarily_unavailable: .*timed out/);
    expect(calls).toEqual([[5_000]]);
  });

  test("a token of a key that is broken → invalid_token", async () => {
    const issuer = new Issuer();
    issuer.keys = [key.jwk, { kty: "EC", crv: "P-256", kid: "broken", x: "AA", y: "AA" }];
    const { outcome, token } = await authorizer(issuer.origin);
    expect(await outcome(await token({ header: { kid: "broken" } }))).toStartWith(
      "invalid_token: ",
    );
    expect(await outcome(await token())).toBe("accepted");
  });

  test("a jwks_uri of https on loopback → the token is accepted", async () => {
    const file = join(temporaryDirectory(), "localhost.pem");
    const made = Bun.spawnSync([
      ..."openssl req -x509 -days 1 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256".split(" "),
      ..."-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout".split(" "),
      ...[file, "-out", `${file}.crt`],
    ]);
    expect(made.success).toBe(true);
    const [pem, cert] = [readFileSync(file, "utf8"), readFileSync(`${file}.crt`, "utf8")];
    const secure = new Issuer(0, { key: pem, cert });
    const issuer = new Issuer();
    metadata({ jwks_uri: `${secure.origin}/jwks` })(issuer);
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    Object.assign(process.env, { TLS_KEY: file, TLS_CERT: `${file}.crt` });
    try {
      expect(await outcome(await token())).toBe("accepted");
    } finally {
      delete process.env["TLS_KEY"];
      delete process.env["TLS_CERT"];
    }
    expect(secure.requests).toEqual(["/jwks"]);
  });

  test("the API starts while the issuer is down, and asks it when a token comes", async () => {
    const port = freePort();
    const api = await startApi(`http://127.0.0.1:${port}`, { coolDownSeconds: 0 });
    const refused = await api.try();
    expect([refused.status, refused.body]).toEqual([
      503,
      "The token cannot be checked now. Try again soon.",
    ]);
    expect(refused.headers).toEqual({ ...plain, "retry-after": "0" });
    const issuer = new Issuer(port);
    await api.get("/.well-known/oauth-protected-resource");
    await call(`${api.resource}/identity`);
    await api.send("no.jwt");
    for (const kid of [undefined, ""])
      expect((await api.try({ header: { kid } })).status).toBe(401);
    expect((await api.try({ header: { alg: "HS256" } })).status).toBe(401);
    expect(issuer.requests).toEqual([]);
    expect((await api.try()).status).toBe(200);
    expect(issuer.requests).toEqual(["/.well-known/openid-configuration", "/jwks"]);
    expect((await lineOf(refused))["error"]).toBe("temporarily_unavailable");
  });

  test("RFC 9110 §10.2.3 no keys → 503, Retry-After, one fetch in the cool-down", async () => {
    const issuer = new Issuer();
    issuer.metadata = status500;
    const api = await startApi(issuer.origin, { coolDownSeconds: 600 });
    const sent = [await api.try(), await api.try(), await api.try({ header: { kid: "unknown" } })];
    for (const { status, headers } of sent) {
      expect([status, headers]).toEqual([503, { ...plain, "retry-after": "600" }]);
    }
    expect((await api.get("/health")).status).toBe(503);
    expect(issuer.fetches).toBe(1);
    const reasons = (await Promise.all(sent.map(lineOf))).map(({ error, reason }) => [
      error,
      reason,
    ]);
    const none = ["temporarily_unavailable", "no keys of the issuer yet"];
    expect(reasons).toEqual([["temporarily_unavailable", "status 500"], none, none]);
    expect(log.text()).toContain('"event":"keys not fetched","reason":"status 500"}\n');
  });

  test("an unknown kid after a good fetch → invalid_token, one fetch in all", async () => {
    const issuer = new Issuer();
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 600 });
    const unknown = async () => outcome(await token({ header: { kid: `kid ${(jtis += 1)}` } }));
    expect(await unknown()).toBe(noKey);
    const many = await Promise.all(Array.from({ length: 50 }, unknown));
    expect(new Set(many)).toEqual(new Set([noKey]));
    expect(await outcome(await token())).toBe("accepted");
    expect(issuer.requests).toEqual(["/.well-known/openid-configuration", "/jwks"]);
  });

  test("an unknown kid fetches within the same call, and the new key counts", async () => {
    const issuer = new Issuer();
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    expect(await outcome(await token())).toBe("accepted");
    expect(await outcome(await token({ key: secondKey }))).toBe(noKey);
    expect(issuer.fetches).toBe(2);
    issuer.keys = [key.jwk, secondKey.jwk];
    expect(await outcome(await token({ key: secondKey }))).toBe("accepted");
    expect(issuer.fetches).toBe(3);
    expect(await outcome(await token({ key: secondKey }))).toBe("accepted");
    expect(await outcome(await token())).toBe("accepted");
    expect(issuer.fetches).toBe(3);
  });

  test("calls at once share one fetch, also without a cool-down", async () => {
    const issuer = new Issuer();
    const { promise: held, resolve: release } = Promise.withResolvers<void>();
    issuer.jwks = () => held.then(() => Response.json({ keys: issuer.keys }));
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    const tokens = await Promise.all(Array.from({ length: 10 }, () => token()));
    const first = tokens.slice(0, 5).map(outcome);
    await eventually("the keys are asked for", () => issuer.requests.includes("/jwks"));
    const second = tokens.slice(5).map(outcome);
    await new Promise(setImmediate); // so that they wait for the keys
    release();
    expect(new Set(await Promise.all([...first, ...second]))).toEqual(new Set(["accepted"]));
    expect(issuer.requests).toEqual(["/.well-known/openid-configuration", "/jwks"]);
  });

  test("an unknown kid, issuer down → temporarily_unavailable if it fetched", async () => {
    const issuer = new Issuer();
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0.25 });
    expect(await outcome(await token())).toBe("accepted");
    issuer.metadata = status500;
    const seen: string[] = [];
    await eventually("a fetch that failed, and a call after it", async () => {
      const { fetches } = issuer;
      const result = await outcome(await token({ key: secondKey }));
      expect(result).toBe(issuer.fetches > fetches ? down : noKey);
      // The last known keys go on counting.
      expect(await outcome(await token())).toBe("accepted");
      seen.push(result);
      return seen.includes(down) && seen.at(-1) === noKey;
    });
    issuer.keys = [secondKey.jwk];
    issuer.metadata = () => Response.json(issuer.document());
    await eventually("the new key", async () => {
      return (await outcome(await token({ key: secondKey }))) === "accepted";
    });
    expect(await outcome(await token())).toBe(noKey);
  });

  test("a useless JWK Set does not replace the last known keys", async () => {
    const issuer = new Issuer();
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    expect(await outcome(await token())).toBe("accepted");
    for (const keys of [[], [null], [{ kty: "oct", kid: "second", k: "AAAA" }]]) {
      issuer.keys = keys;
      const reason = "temporarily_unavailable: no usable key in the JWK Set";
      expect(await outcome(await token({ key: secondKey }))).toBe(reason);
      expect(await outcome(await token())).toBe("accepted");
    }
  });

  test("a key that takes the kid of another → tokens of the old one are refused", async () => {
    const issuer = new Issuer();
    issuer.keys = [key.jwk, secondKey.jwk];
    const { outcome, token } = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    const [old, fresh] = [await token(), await token({ key: stranger })];
    expect([await outcome(old), await outcome(old)]).toEqual(["accepted", "accepted"]);
    expect(await outcome(fresh)).toBe("invalid_token: signature verification failed");
    issuer.keys = [stranger.jwk, secondKey.jwk];
    await outcome(await token({ header: { kid: "unknown" } }));
    expect(await outcome(fresh)).toBe("accepted");
    expect(await outcome(old)).toBe("invalid_token: signature verification failed");
  });
});

/** The port of a server that closes every connection. */
function hangingUp(): number {
  const server = Bun.listen({
    hostname: "127.0.0.1",
    port: 0,
    socket: { data: (socket) => void socket.end() },
  });
  stops.push(async () => server.stop(true));
  return server.port;
}

/** The JWK Set as a file. */
function jwksFile(): string {
  const file = join(temporaryDirectory(), "jwks.json");
  writeFileSync(file, JSON.stringify({ keys: [key.jwk] }));
  return file;
}

describe("background refresh", () => {
  test("every refreshSeconds, once there are keys, and a failure changes nothing", async () => {
    let [tick, delay] = [() => {}, 0];
    const unref = mock();
    const spy = spyOn(globalThis, "setInterval").mockImplementation(((
      run: () => void,
      ms: number,
    ) => {
      [tick, delay] = [run, ms];
      return { unref };
    }) as unknown as typeof setInterval);
    const issuer = new Issuer();
    const settings = { refreshSeconds: 77, coolDownSeconds: 0 };
    const api = await startApi(issuer.origin, settings).finally(() => spy.mockRestore());
    expect([delay, unref.mock.calls.length]).toEqual([77_000, 1]);

    tick();
    const old = await api.token();
    issuer.metadata = status500;
    expect((await api.send(old)).status).toBe(503);
    expect(issuer.fetches).toBe(1);
    issuer.metadata = () => Response.json(issuer.document());
    expect((await api.send(old)).status).toBe(200);
    expect(issuer.fetches).toBe(2);

    for (const behaviour of [status500, () => Response.json({}), issuer.metadata]) {
      const { fetches } = issuer;
      issuer.metadata = behaviour;
      tick();
      await eventually("a fetch", () => issuer.fetches > fetches);
      expect((await api.send(old)).status).toBe(200);
      expect((await api.try()).status).toBe(200);
    }

    issuer.keys = [secondKey.jwk];
    tick();
    await eventually("the key is gone", async () => (await api.send(old)).status === 401);
    expect((await api.try({ key: secondKey })).status).toBe(200);
  });

  test("in a running program: keys are replaced, and outlive an outage", async () => {
    const issuer = new Issuer();
    const resource = freeOrigin();
    const program = launch("api", {
      env: { ISSUER: issuer.origin, API_URL: resource },
      changes: { resourceServer: { refreshSeconds: 0.05, coolDownSeconds: 0 } },
    });
    await program.printed(/API: /);
    const send = async (deviation: TokenDeviation) => {
      const authorization = `Bearer ${await newToken(issuer.origin, resource, deviation)}`;
      return (await fetch(`${resource}/identity`, { headers: { authorization } })).status;
    };
    expect(await send({})).toBe(200);
    issuer.keys = [secondKey.jwk];
    await eventually("the key is gone", async () => (await send({})) === 401);
    issuer.metadata = status500;
    const { fetches } = issuer;
    await eventually("three fetches that failed", () => issuer.fetches >= fetches + 3);
    expect(await send({ key: secondKey })).toBe(200);
    const failed = () => program.log.some(({ reason }) => reason === "status 500");
    await eventually("a line in the log", failed);
    await program.stop();
  });
});

// --- Remembered tokens ---------------------------------------------------------------------------

describe("authorize", () => {
  /** How many signatures were verified during a run. */
  async function verified(run: () => Promise<unknown>): Promise<number> {
    const spy = spyOn(crypto.subtle, "verify");
    try {
      await run();
      return spy.mock.calls.length;
    } finally {
      spy.mockRestore();
    }
  }

  /** A module that has its keys. */
  async function ready(issuer = new Issuer()) {
    const api = await authorizer(issuer.origin, { coolDownSeconds: 0 });
    expect(await api.outcome(await api.token())).toBe("accepted");
    const count = (token: string) =>
      verified(async () => expect(await api.outcome(token)).toBe("accepted"));
    return { ...api, count };
  }

  test("a valid call, whatever its URL → the claims; the second time without waiting", async () => {
    const { authorize, request, token } = await ready();
    const text = await token({ claims: { scope: "api1 orders" } });
    const claims = jose.decodeJwt(text);
    const first = authorize(request(`Bearer ${text}`), "api1");
    expect(first).toBeInstanceOf(Promise);
    expect(await first).toEqual(claims as never);
    expect(authorize(request(`Bearer ${text}`), "api1")).toBe((await first) as never);
    // Another scope of the same token.
    expect(authorize(request(`Bearer ${text}`), "orders")).toEqual(claims as never);
  });

  test("a call that is refused → rejects with a Refusal: code, reason, details", async () => {
    const { authorize, Refusal, request, token } = await ready();
    const refusal = async (field: string, scope: string) => {
      const error = await Promise.resolve(authorize(request(field), scope)).catch((e) => e);
      expect(error).toBeInstanceOf(Refusal);
      return { code: error.code, reason: error.message, details: error.details };
    };
    const field = `Bearer ${await token({ claims: { jti: "mine" } })}`;
    const details = { scope: "api2", client_id: "caller", jti: "mine" };
    const insufficient = { code: "insufficient_scope", reason: "not in the token", details };
    expect(await refusal(field, "api2")).toEqual(insufficient);
    expect(await refusal(field, "api2")).toEqual(insufficient);
    const reason = "no well-formed access token";
    const none = { code: "no_credentials", reason, details: {} };
    expect(await refusal("", "api1")).toEqual(none);
    expect(await refusal("Bearer", "api1")).toEqual({ ...none, code: "invalid_request" });
    const invalid = { code: "invalid_token", reason: "Invalid Compact JWS", details: {} };
    expect(await refusal("Bearer token", "api1")).toEqual(invalid);
  });

  test("a remembered token is not verified again, in whatever scope", async () => {
    const { authorize, request, token, count } = await ready();
    const text = await token();
    expect(await count(text)).toBe(1);
    expect(await count(text)).toBe(0);
    const other = async () => {
      const { code } = await Promise.resolve(authorize(request(`Bearer ${text}`), "x")).catch(
        (e) => e,
      );
      expect(code).toBe("insufficient_scope");
    };
    expect(await verified(other)).toBe(0);
  });

  test("a token that is refused is not remembered", async () => {
    const { outcome, token } = await ready();
    const text = await token({ key: stranger });
    const refused = async () => {
      expect(await outcome(text)).toBe("invalid_token: signature verification failed");
    };
    expect([await verified(refused), await verified(refused)]).toEqual([1, 1]);
  });

  test.each([
    ["now", 0, 1],
    ["a second ago", -1, 1],
    ["in 60 s", 60, 0],
  ])("exp %s (%d s): the second call verifies %d signatures", async (_, exp, times) => {
    const { token, count } = await ready();
    const counts = await withinOneSecond(async (now) => {
      const text = await token({ exp }, now);
      return [await count(text), await count(text)];
    });
    expect(counts).toEqual([1, times]);
  });

  test.each([
    [4_096, 0],
    [4_097, 1],
  ])(
    "an Authorization field of %d characters: the second call verifies %d signatures",
    async (size, times) => {
      const { authorize, request, token } = await ready();
      const text = await token({ claims: { long: "x".repeat(2_500) } });
      const field = `Bearer${" ".repeat(size - 6 - text.length)}${text}`;
      const run = () => verified(async () => authorize(request(field), "api1"));
      expect(field).toHaveLength(size);
      expect([await run(), await run()]).toEqual([1, times]);
    },
  );

  test("the last 1,000 tokens are remembered, the oldest forgotten first", async () => {
    // The first call of a module brings the keys, so its token is not remembered.
    const { outcome, token, count } = await ready();
    const tokens = await Promise.all(Array.from({ length: 1_001 }, () => token()));
    const [oldest, second, third] = tokens as [string, string, string];
    for (const text of tokens.slice(0, 1_000)) await outcome(text);
    expect(await verified(() => Promise.all(tokens.slice(0, 1_000).map(outcome)))).toBe(0);
    expect(await count(tokens[1_000]!)).toBe(1);
    expect([await count(second), await count(tokens[1_000]!)]).toEqual([0, 0]);
    expect(await count(oldest)).toBe(1);
    expect([await count(third), await count(second)]).toEqual([0, 1]);
  });

  test("a set without its key → the token is refused, others verified again", async () => {
    const issuer = new Issuer();
    issuer.keys = [key.jwk, secondKey.jwk];
    const { outcome, token, count } = await ready(issuer);
    const [removed, kept] = [await token(), await token({ key: secondKey })];
    expect([await count(removed), await count(kept)]).toEqual([1, 1]);
    expect([await count(removed), await count(kept)]).toEqual([0, 0]);
    const fetchKeys = async () => outcome(await token({ header: { kid: "unknown" } }));
    // The same set again, or a fetch that failed: nothing is forgotten.
    await fetchKeys();
    expect([await count(removed), await count(kept)]).toEqual([0, 0]);
    issuer.jwks = () => Response.json({ keys: [] });
    await fetchKeys();
    expect([await count(removed), await count(kept)]).toEqual([0, 0]);
    issuer.jwks = () => Response.json({ keys: [secondKey.jwk] });
    await fetchKeys();
    expect(await outcome(removed)).toBe(noKey);
    expect([await count(kept), await count(kept)]).toEqual([1, 0]);
  });
});
