/**
 * private_key_jwt at POST /connect/token: RFC 7521 §4.2, RFC 7523 §2.2 and §3, and the audience as
 * rfc7523bis has it. Each row is one deviation from a valid assertion. The caller always sees the
 * same 401, so the log tells which check refused.
 */

import { SQL } from "bun";
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import * as jose from "jose";
import { authorizationServer, type ClientRegistration } from "../config.ts";
import {
  captureLog,
  cleanUp,
  exchange,
  freeOrigin,
  freePort,
  launch,
  signedJwt,
  temporaryDirectory,
  withinOneSecond,
  withModule,
} from "./support.ts";

type Idp = typeof import("../idp.ts");
type Server = Awaited<ReturnType<Idp["start"]>>;

const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
const secret = { sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }; // "secret"

// --- Clients and their keys ----------------------------------------------------------------------

async function pair(alg: string, kid?: string) {
  const { privateKey, publicKey } = await jose.generateKeyPair(alg, { extractable: true });
  return { privateKey, jwk: { ...(await jose.exportJWK(publicKey)), ...(kid && { kid }) } };
}

const app = await pair("ES256", "app");
const other = await pair("ES256", "other");
const unnamed = await pair("Ed25519");
const first = await pair("ES256", "first");
const second = await pair("Ed25519", "second");
const unregistered = await pair("ES256", "app");
const p384 = await pair("ES384", "P-384");
const p521 = await pair("ES512", "P-521");
const rsa = await pair("RS256", "RSA");
const mlDsa = await Promise.all(["ML-DSA-44", "ML-DSA-65", "ML-DSA-87"].map((a) => pair(a, a)));

/** Every algorithm on the allow-list, with a key that fits. */
const algorithms: [string, { privateKey: CryptoKey; jwk: jose.JWK }][] = [
  ["ES256", first],
  ["ES384", p384],
  ["ES512", p521],
  ["RS256", rsa],
  ["RS384", rsa],
  ["RS512", rsa],
  ["PS256", rsa],
  ["PS384", rsa],
  ["PS512", rsa],
  ["EdDSA", second],
  ["Ed25519", second],
  ["ML-DSA-44", mlDsa[0]!],
  ["ML-DSA-65", mlDsa[1]!],
  ["ML-DSA-87", mlDsa[2]!],
];

const registration = {
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 3600,
};
const withAlg = (alg: string, { jwk }: { jwk: jose.JWK }) => ({ ...jwk, alg });
const clients: ClientRegistration[] = [
  { client_id: "app", jwks: { keys: [app.jwk] }, ...registration },
  { client_id: "other", jwks: { keys: [other.jwk] }, ...registration },
  { client_id: "unnamed", jwks: { keys: [unnamed.jwk] }, ...registration },
  { client_id: "several", jwks: { keys: [first.jwk, second.jwk] }, ...registration },
  { client_id: "both", jwks: { keys: [app.jwk] }, client_secrets: [secret], ...registration },
  { client_id: "client", client_secrets: [secret], ...registration },
  {
    client_id: "every",
    jwks: {
      keys: [first, second, p384, p521, rsa]
        .map(({ jwk }) => jwk)
        .concat(mlDsa.map((key) => withAlg(`${key.jwk.kid}`, key))),
    },
    ...registration,
  },
];

// --- Requests ------------------------------------------------------------------------------------

/** What differs from a valid request. A member that is undefined is left out. */
interface Deviation {
  client?: string;
  header?: Record<string, unknown>;
  claims?: Record<string, unknown>;
  /** Claims with times, in seconds from now. */
  times?: Record<string, number>;
  key?: CryptoKey | "none";
  form?: Record<string, string | undefined>;
  repeated?: string;
  empty?: string;
  headers?: Record<string, string>;
  /** How often it is sent; the last answer counts. */
  sent?: number;
}

interface Answer {
  status: number;
  headers: Record<string, string>;
  body: Record<string, unknown>;
  assertion: string;
  jti: unknown;
  entry: number;
}

const issuer = freeOrigin();
const tokenEndpoint = `${issuer}/connect/token`;
const database = `${temporaryDirectory()}/keys.db`;
let sent = 0;
let jtis = 0;

async function build(deviation: Deviation, now: number, audience = issuer) {
  const { client = "app", key, times = {}, repeated, empty } = deviation;
  const jti = `jti ${(jtis += 1)}`;
  const valid = { iss: client, sub: client, aud: audience, exp: now + 60, iat: now, jti };
  const dates = Object.entries(times).map(([claim, seconds]) => [claim, now + seconds]);
  const claims = { ...valid, ...deviation.claims, ...Object.fromEntries(dates) };
  const header = { alg: "ES256", kid: "app", ...deviation.header };
  const signing = key === "none" ? undefined : (key ?? app.privateKey);
  const assertion = await signedJwt(header, claims, signing);
  const form = {
    grant_type: "client_credentials",
    client_assertion_type: jwtBearer,
    client_assertion: assertion,
    ...deviation.form,
  };
  const present = Object.entries(form).filter((entry): entry is [string, string] => !!entry[1]);
  const body = new URLSearchParams(present);
  if (repeated) body.append(repeated, body.get(repeated)!);
  if (empty) body.append(empty, "");
  return { body, assertion, jti: claims.jti };
}

async function post(url: string, body: URLSearchParams, headers = {}): Promise<Response> {
  return await fetch(url, { method: "POST", body, headers });
}

async function answerTo(deviation: Deviation): Promise<Answer> {
  const run = async (now: number): Promise<Answer> => {
    const { body, assertion, jti } = await build(deviation, now);
    let response: Response;
    for (let left = deviation.sent ?? 1; left > 0; left--) {
      response = await post(tokenEndpoint, body, deviation.headers);
      sent += 1;
    }
    const { status, headers } = response!;
    const { date, "content-length": length, ...fields } = headers.toJSON();
    const answer = (await response!.json()) as Record<string, unknown>;
    return { status, headers: fields, body: answer, assertion, jti, entry: sent - 1 };
  };
  return deviation.times ? await withinOneSecond(run) : await run(Math.floor(Date.now() / 1000));
}

const fields = {
  "cache-control": "no-store",
  "content-type": "application/json;charset=utf-8",
  pragma: "no-cache",
};

/** The one answer to whatever is wrong with the credentials. */
const invalidClient = {
  error: "invalid_client",
  error_description: "Client authentication failed. The log of the server has the reason.",
};
const invalidRequest = {
  error: "invalid_request",
  error_description: "The request is malformed, repeats a parameter or authenticates twice.",
};

const usedId = (...holder: unknown[]) =>
  createHash("sha256").update(JSON.stringify(holder)).digest("base64url");

function usedJtis(file = database) {
  const opened = new Database(file, { readonly: true });
  const rows = opened.query("SELECT id, expires_at FROM used_jtis").all();
  opened.close();
  return rows as { id: string; expires_at: number }[];
}

// --- Rows ----------------------------------------------------------------------------------------

const accepted: [rule: string, deviation: Deviation][] = [
  ["§2.2 a valid assertion", {}],
  ["RFC 7521 §4.2 client_id that agrees", { form: { client_id: "app" } }],
  ["RFC 6749 §3.2 client_secret without a value beside it", { empty: "client_secret" }],
  ["§3 (3) aud an array of the issuer alone", { claims: { aud: [issuer] } }],
  ["§3 (4) exp 29 s ago, within the leeway", { times: { exp: -29 } }],
  ["§3 (4) exp 630 s ahead: 10 minutes and the leeway", { times: { exp: 630 } }],
  ["§3 (5) nbf 30 s ahead, within the leeway", { times: { nbf: 30 } }],
  ["§3 (5) nbf past", { times: { nbf: -3600 } }],
  ["§3 (6) iat 30 s ahead, within the leeway", { times: { iat: 30 } }],
  ["§3 (6) iat a day ago", { times: { iat: -86_400 } }],
  ["§3 (6) no iat", { claims: { iat: undefined } }],
  ["§3 (8) a claim that is not known here", { claims: { aud2: "x", htm: "GET" } }],
  ["§3 (9) no kid, the client has one key", { header: { kid: undefined } }],
  [
    "§3 (9) no kid, the client has one key without a kid",
    {
      client: "unnamed",
      key: unnamed.privateKey,
      header: { alg: "EdDSA", kid: undefined },
    },
  ],
  [
    "§3 (9) kid of the second of several keys",
    { client: "several", key: second.privateKey, header: { alg: "EdDSA", kid: "second" } },
  ],
  ["RFC 7519 §5.1 typ JWT", { header: { typ: "JWT" } }],
  ["rfc7523bis typ client-authentication+jwt", { header: { typ: "client-authentication+jwt" } }],
  ["RFC 6749 §2.3 a client that also has a secret", { client: "both" }],
  ["§3 (7) the jti of another client's assertion", { claims: { jti: "shared" } }],
  ["§3 (7) the same jti from this client", { client: "both", claims: { jti: "shared" } }],
];

const noKey = "no applicable key found in the JSON Web Key Set";
const audience = "another audience than the issuer";
const unknownType = "unknown assertion type";
const hmacKey = await crypto.subtle.importKey(
  "raw",
  Buffer.from(JSON.stringify(app.jwk)),
  { name: "HMAC", hash: "SHA-256" },
  false,
  ["sign"],
);

const refused: [rule: string, deviation: Deviation, reason: string][] = [
  ["§2.2 no client_assertion_type", { form: { client_assertion_type: undefined } }, unknownType],
  [
    "§2.2 client_assertion_type of SAML",
    {
      form: {
        client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:saml2-bearer",
      },
    },
    unknownType,
  ],
  [
    "§2.2 client_assertion_type with a character more",
    { form: { client_assertion_type: `${jwtBearer}2` } },
    unknownType,
  ],
  ["§2.2 no client_assertion", { form: { client_assertion: undefined } }, "Invalid JWT"],
  [
    "§2.2 no client_assertion, but client_id",
    { form: { client_assertion: undefined, client_id: "app" } },
    "Invalid JWT",
  ],
  ["§2.2 client_assertion is no JWT", { form: { client_assertion: "assertion" } }, "Invalid JWT"],
  [
    "§2.2 client_assertion has five parts",
    { form: { client_assertion: "a.b.c.d.e" } },
    "Only JWTs using Compact JWS serialization can be decoded",
  ],
  ["§3 (1) no iss", { claims: { iss: undefined } }, 'missing required "iss" claim'],
  ["§3 (1) iss of another client", { claims: { iss: "other" } }, 'unexpected "iss" claim value'],
  ["§3 (1) iss an array", { claims: { iss: ["app"] } }, 'unexpected "iss" claim value'],
  ["§3 (2) no sub", { claims: { sub: undefined } }, "client unknown or without keys"],
  ["§3 (2) sub of another client", { claims: { sub: "other" } }, noKey],
  ["§3 (2) sub an array", { claims: { sub: ["app"] } }, 'unexpected "sub" claim value'],
  [
    "§3 (2) a client that is not registered",
    { client: "nobody" },
    "client unknown or without keys",
  ],
  [
    "§3 (2) a client that has only a secret",
    { client: "client" },
    "client unknown or without keys",
  ],
  ["§3 (3) no aud", { claims: { aud: undefined } }, audience],
  ["§3 (3) aud of another server", { claims: { aud: "https://issuer.example" } }, audience],
  ["§3 (3) aud with a slash at the end", { claims: { aud: `${issuer}/` } }, audience],
  ["§3 (3) aud the URL of the token endpoint", { claims: { aud: tokenEndpoint } }, audience],
  [
    "§3 (3) aud an array with another member",
    { claims: { aud: [issuer, "https://issuer.example"] } },
    audience,
  ],
  [
    "§3 (3) aud an array with the token endpoint",
    { claims: { aud: [tokenEndpoint, issuer] } },
    audience,
  ],
  ["§3 (3) aud an array of the issuer twice", { claims: { aud: [issuer, issuer] } }, audience],
  ["§3 (3) aud an empty array", { claims: { aud: [] } }, audience],
  ["§3 (3) aud an array in an array", { claims: { aud: [[issuer]] } }, audience],
  ["§3 (4) no exp", { claims: { exp: undefined } }, 'missing required "exp" claim'],
  ["§3 (4) exp a string", { claims: { exp: "4102444800" } }, '"exp" claim must be a number'],
  [
    "§3 (4) exp 30 s ago, at the end of the leeway",
    { times: { exp: -30 } },
    '"exp" claim timestamp check failed',
  ],
  ["§3 (4) exp 631 s ahead", { times: { exp: 631 } }, "exp too far ahead"],
  ["§3 (5) nbf 31 s ahead", { times: { nbf: 31 } }, '"nbf" claim timestamp check failed'],
  ["§3 (5) nbf a string", { claims: { nbf: "0" } }, '"nbf" claim must be a number'],
  ["§3 (6) iat 31 s ahead", { times: { iat: 31 } }, "iat in the future"],
  ["§3 (6) iat a string", { claims: { iat: "0" } }, '"iat" claim must be a number'],
  ["§3 (7) no jti", { claims: { jti: undefined } }, "no jti"],
  ["§3 (7) an empty jti", { claims: { jti: "" } }, "no jti"],
  ["§3 (7) jti a number", { claims: { jti: 7 } }, "no jti"],
  ["§3 (7) jti an array", { claims: { jti: ["7"] } }, "no jti"],
  ["§3 (7) sent a second time", { sent: 2 }, "jti used before"],
  ["§3 (7) jti of another assertion", { claims: { jti: "shared" } }, "jti used before"],
  [
    "§3 (9) signed with a key that is not registered",
    { key: unregistered.privateKey },
    "signature verification failed",
  ],
  ["§3 (9) key of another client", { key: other.privateKey, header: { kid: "other" } }, noKey],
  ["§3 (9) unknown kid", { header: { kid: "nobody" } }, noKey],
  ["§3 (9) an empty kid", { header: { kid: "" } }, noKey],
  [
    "§3 (9) no kid, the client has several keys, of which one fits alg",
    { client: "several", key: second.privateKey, header: { alg: "EdDSA", kid: undefined } },
    "no kid, and several keys",
  ],
  ["§3 (9) alg of another curve", { header: { alg: "ES384" } }, noKey],
  ["§3 (9) no signature", { key: "none" }, "signature verification failed"],
  [
    "§3 (9) alg none",
    { key: "none", header: { alg: "none" } },
    '"alg" (Algorithm) Header Parameter value not allowed',
  ],
  [
    "§3 (9) alg HS256 with the public key as the secret",
    { key: hmacKey, header: { alg: "HS256" } },
    '"alg" (Algorithm) Header Parameter value not allowed',
  ],
  [
    "§3 (9) no alg",
    { header: { alg: undefined } },
    'JWS "alg" (Algorithm) Header Parameter missing or invalid',
  ],
  [
    "RFC 7515 §4.1.11 crit with an unknown name",
    { header: { crit: ["x"], x: 1 } },
    'Extension Header Parameter "x" is not recognized',
  ],
  [
    "RFC 7515 §4.1.11 crit with b64",
    { header: { crit: ["b64"], b64: true } },
    "crit in the header",
  ],
];

const twice = "authenticates in more than one way";
const basic = `Basic ${btoa("both:secret")}`;

const malformed: [rule: string, deviation: Deviation, reason: string][] = [
  ["RFC 6749 §2.3 client_secret beside it", { form: { client_secret: "secret" } }, twice],
  ["RFC 6749 §2.3 Basic beside it", { client: "both", headers: { authorization: basic } }, twice],
  ["RFC 6749 §2.3 Bearer beside it", { headers: { authorization: "Bearer token" } }, twice],
  [
    "RFC 6749 §2.3 client_assertion_type alone, client_secret beside it",
    { client: "both", form: { client_assertion: undefined, client_secret: "secret" } },
    twice,
  ],
  [
    "RFC 6749 §2.3 client_assertion alone, Basic beside it",
    {
      client: "both",
      form: { client_assertion_type: undefined },
      headers: { authorization: basic },
    },
    twice,
  ],
  ["RFC 7521 §4.2 client_id of another client", { form: { client_id: "other" } }, "two client ids"],
  [
    "RFC 6749 §3.2 client_assertion twice",
    { repeated: "client_assertion" },
    "client_assertion is repeated",
  ],
  [
    "RFC 6749 §3.2 client_assertion_type twice",
    { repeated: "client_assertion_type" },
    "client_assertion_type is repeated",
  ],
];

/** Rows name the section alone where it is one of RFC 7523. */
const ofRfc7523 = <Any extends [string, ...unknown[]]>(rows: Any[]): Any[] =>
  rows.map(([rule, ...rest]) => [rule.replace(/^§/, "RFC 7523 §"), ...rest] as Any);

// --- Tests ---------------------------------------------------------------------------------------

let server: Server;
let refresh: Idp["refresh"];
const log = captureLog();
const answers = new Map<Deviation, Answer>();

beforeAll(async () => {
  const changes = { issuer, clients, databaseUrl: `sqlite://${database}` };
  server = await withModule("idp", { authorizationServer: changes }, async (module: Idp) => {
    refresh = module.refresh;
    return await module.start();
  });
  // All rows are sent first, one after the other, for the log is written five times a second.
  for (const [, deviation] of [...accepted, ...refused, ...malformed]) {
    answers.set(deviation, await answerTo(deviation));
  }
  await log.until(sent);
});

afterAll(async () => {
  log.stop();
  await server.stop(true);
  await cleanUp();
});

describe("POST /connect/token private_key_jwt", () => {
  test.each(ofRfc7523(accepted))("%s → 200", (_, deviation) => {
    const { status, headers, body, entry, jti } = answers.get(deviation)!;
    const client_id = deviation.client ?? "app";
    expect(status).toBe(200);
    expect(headers).toEqual(fields);
    expect(body).toMatchObject({ token_type: "Bearer", expires_in: 3600, scope: "api1" });
    const token = jose.decodeJwt(`${body["access_token"]}`);
    expect(token).toMatchObject({ iss: issuer, sub: client_id, client_id, scope: "api1" });
    expect(log.requests[entry]).toMatchObject({
      event: "token issued",
      client_id,
      jti: token.jti!,
    });
    expect(log.requests[entry]).not.toContainKeys(["error", "reason"]);
    expect(usedJtis().map(({ id }) => id)).toContain(usedId("assertion", client_id, jti));
  });

  test.each(ofRfc7523(refused))("%s → 401 invalid_client", (_, deviation, reason) => {
    const { status, headers, body, entry, jti } = answers.get(deviation)!;
    expect(status).toBe(401);
    const challenge = `Basic realm="${issuer}", charset="UTF-8"`;
    expect(headers).toEqual({ ...fields, "www-authenticate": challenge });
    expect(body).toEqual(invalidClient);
    const { event, error, address } = log.requests[entry]!;
    expect({ event, error, address }).toEqual({
      event: "token refused",
      error: "invalid_client",
      address: "127.0.0.1",
    });
    expect(log.requests[entry]!["reason"]).toBe(reason);
    // A refused assertion uses up nothing; another one with its jti may still come.
    const used = usedJtis().map(({ id }) => id);
    const kept = used.includes(usedId("assertion", deviation.client ?? "app", jti));
    expect(kept).toBe(reason === "jti used before");
  });

  test.each(malformed)("%s → 400 invalid_request", (_, deviation, reason) => {
    const { status, headers, body, entry } = answers.get(deviation)!;
    expect(status).toBe(400);
    expect(headers).toEqual(fields);
    expect(body).toEqual(invalidRequest);
    expect(log.requests[entry]).toMatchObject({ error: "invalid_request", reason });
  });

  test("no part of an assertion is in the log, nor of an unknown sub", async () => {
    const { entry } = await answerTo({ client: "x".repeat(300) });
    await log.until(sent);
    const { time, milliseconds, ...told } = log.requests[entry]!;
    expect(told).toEqual({
      ...{ event: "token refused", address: "127.0.0.1", error: "invalid_client" },
      reason: "client unknown or without keys",
    });
    for (const { assertion } of answers.values()) {
      expect(log.text()).not.toContain(assertion.split(".")[1]!);
    }
  });

  test("RFC 7523 §3.2 every 401 is the same, byte for byte", async () => {
    const deviations: Deviation[] = [
      {},
      { form: { client_assertion_type: undefined } },
      { form: { client_assertion: "x" } },
      { client: "nobody" },
      { key: other.privateKey },
      { claims: { aud: tokenEndpoint } },
      { claims: { jti: "shared" } },
    ];
    const now = Math.floor(Date.now() / 1000);
    const forms = await Promise.all(deviations.map((deviation) => build(deviation, now)));
    const bodies = forms.map(({ body }) => `${body}`);
    bodies.push("grant_type=client_credentials&client_id=client&client_secret=wrong");
    const { host } = new URL(issuer);
    const fields = `Host: ${host}\r\nContent-Type: application/x-www-form-urlencoded`;
    const raw = await Promise.all(
      bodies.map(async (body) => {
        const head = `POST /connect/token HTTP/1.1\r\n${fields}\r\nConnection: close`;
        const request = `${head}\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
        return (await exchange(issuer, request)).replace(/\r\nDate: [^\r]*/, "");
      }),
    );
    sent += bodies.length;
    const [issued, ...refusals] = raw;
    expect(issued).toStartWith("HTTP/1.1 200 OK\r\n");
    expect(refusals[0]).toStartWith("HTTP/1.1 401 Unauthorized\r\n");
    expect(refusals[0]).toEndWith(`\r\n\r\n${JSON.stringify(invalidClient)}`);
    expect(new Set(refusals).size).toBe(1);
  });

  test.each(algorithms)("RFC 7523 §3 (9) alg %s → 200", async (alg, { privateKey, jwk }) => {
    const pkcs8 = await jose.importPKCS8(await jose.exportPKCS8(privateKey), alg);
    const answer = await answerTo({ client: "every", key: pkcs8, header: { alg, kid: jwk.kid } });
    expect(answer.body).not.toHaveProperty("error");
    expect(answer.status).toBe(200);
  });

  test("RFC 7523 §3 (9) an alg that acceptedAlgorithms does not have → 401", async () => {
    const changes = {
      issuer: freeOrigin(),
      clients,
      acceptedAlgorithms: ["ES256"],
      databaseUrl: `sqlite://${temporaryDirectory()}/keys.db`,
    };
    const strict = await withModule("idp", { authorizationServer: changes }, (module: Idp) =>
      module.start(),
    );
    const url = `${changes.issuer}/connect/token`;
    const now = Math.floor(Date.now() / 1000);
    const several = { client: "several", key: second.privateKey };
    const header = { alg: "EdDSA", kid: "second" };
    const other = await build({ ...several, header }, now, changes.issuer);
    const usual = await build({}, now, changes.issuer);
    const statuses = [await post(url, other.body), await post(url, usual.body)];
    sent += 2;
    await strict.stop(true);
    expect(statuses.map(({ status }) => status)).toEqual([401, 200]);
    await log.until(sent);
    expect(log.requests.at(-2)!["reason"]).toBe(
      '"alg" (Algorithm) Header Parameter value not allowed',
    );
  });
});

describe("used_jtis", () => {
  test("a row is the SHA-256 of kind, client and jti, and expires with the leeway", async () => {
    const exp = Math.floor(Date.now() / 1000) + 60;
    const whole = { iss: "app", exp, jti: "whole" };
    const fraction = { iss: "app", exp: exp + 0.25, jti: "fraction" };
    expect((await answerTo({ claims: whole })).status).toBe(200);
    expect((await answerTo({ claims: fraction })).status).toBe(200);
    const rows = usedJtis();
    expect(rows).toContainEqual({ id: usedId("assertion", "app", "whole"), expires_at: exp + 30 });
    expect(rows).toContainEqual({
      id: usedId("assertion", "app", "fraction"),
      expires_at: exp + 31,
    });
  });

  test("a row is swept when it has been over for more than 300 s", async () => {
    const exp = Math.floor(Date.now() / 1000) + 60;
    expect((await answerTo({ claims: { jti: "swept", exp } })).status).toBe(200);
    expect((await answerTo({ claims: { jti: "kept", exp: exp + 2 } })).status).toBe(200);
    const [swept, kept] = [usedId("assertion", "app", "swept"), usedId("assertion", "app", "kept")];
    const there = () => usedJtis().map(({ id }) => [swept, kept].indexOf(id));
    await refresh(exp + 30 + 300);
    expect(there()).toContain(0);
    await refresh(exp + 30 + 301);
    expect(there()).not.toContain(0);
    expect(there()).toContain(1);
    // What is swept counts as never used.
    expect((await answerTo({ claims: { jti: "swept", exp } })).status).toBe(200);
    expect((await answerTo({ claims: { jti: "kept", exp } })).status).toBe(401);
  });

  test("out of reach → 503 temporarily_unavailable, a secret still works, and it heals", async () => {
    const { body } = await build({}, Math.floor(Date.now() / 1000));
    const opened = new Database(database);
    opened.run("ALTER TABLE used_jtis RENAME TO hidden");
    const response = await post(tokenEndpoint, body);
    const form = { grant_type: "client_credentials", client_id: "client", client_secret: "secret" };
    const unaffected = await post(tokenEndpoint, new URLSearchParams(form));
    opened.run("ALTER TABLE hidden RENAME TO used_jtis");
    opened.close();
    sent += 3;
    expect(response.status).toBe(503);
    const { date, "content-length": length, ...headers } = response.headers.toJSON();
    expect(headers).toEqual({ ...fields, "retry-after": "5" });
    expect(await response.json()).toEqual({
      error: "temporarily_unavailable",
      error_description: "The server cannot answer this now. Try again soon.",
    });
    expect(unaffected.status).toBe(200);
    expect((await post(tokenEndpoint, body)).status).toBe(200);
    await log.until(sent);
    expect(log.requests.at(-3)).toMatchObject({
      error: "temporarily_unavailable",
      reason: "no such table: used_jtis",
    });
  });

  test("one assertion sent 20 times at once → exactly one token", async () => {
    const { body } = await build({}, Math.floor(Date.now() / 1000));
    const responses = await Promise.all(
      Array.from({ length: 20 }, () => post(tokenEndpoint, body)),
    );
    sent += 20;
    const statuses = responses.map(({ status }) => status).toSorted();
    expect(statuses).toEqual([200, ...Array(19).fill(401)]);
    await log.until(sent);
    const reasons = log.requests.slice(-20).flatMap(({ reason }) => reason ?? []);
    expect(reasons).toEqual(Array(19).fill("jti used before"));
  });
});

// --- Several processes ---------------------------------------------------------------------------

/** Runs `use` with a new database of TEST_DATABASE_URL's server, which is dropped afterwards. */
async function withPostgres(use: (databaseUrl: string) => Promise<void>): Promise<void> {
  const url = new URL(process.env["TEST_DATABASE_URL"]!);
  const admin = new SQL(url.href, { max: 1 });
  const name = `assertion_${process.pid}_${Date.now()}`;
  await admin.unsafe(`CREATE DATABASE ${name}`);
  try {
    url.pathname = `/${name}`;
    await use(url.href);
  } finally {
    await admin.unsafe(`DROP DATABASE ${name} WITH (FORCE)`);
    await admin.close();
  }
}

async function withSqlite(use: (databaseUrl: string) => Promise<void>): Promise<void> {
  await use(`sqlite://${temporaryDirectory()}/keys.db`);
}

const postgres = process.env["TEST_DATABASE_URL"] ? "" : " (skipped: no TEST_DATABASE_URL)";

describe.each([
  ["SQLite", withSqlite],
  [`PostgreSQL${postgres}`, withPostgres],
])("two processes on one database: %s", (_, withDatabase) => {
  const skipped = withDatabase === withPostgres && postgres !== "";

  test.skipIf(skipped)(
    "one assertion sent 20 times at once → exactly one token, also after a restart",
    async () => {
      await withDatabase(async (databaseUrl) => {
        const changes = { authorizationServer: { clients } };
        const listeners = [0, 1, 2].map(() => freePort());
        const origin = `http://127.0.0.1:${listeners[0]}`;
        const started = async (port: number) => {
          const ISSUER_LISTEN = `127.0.0.1:${port}`;
          const env = { ISSUER: origin, ISSUER_LISTEN, DATABASE_URL: databaseUrl };
          const program = launch("idp", { env, changes });
          await program.printed(/authorization server/);
          return { program, url: `http://${ISSUER_LISTEN}/connect/token` };
        };
        const pair = await Promise.all([started(listeners[0]!), started(listeners[1]!)]);
        const now = Math.floor(Date.now() / 1000);
        const { body } = await build({}, now, origin);
        const responses = await Promise.all(
          Array.from({ length: 20 }, (_, index) => post(pair[index % 2]!.url, body)),
        );
        const statuses = responses.map(({ status }) => status).toSorted();
        expect(statuses).toEqual([200, ...Array(19).fill(401)]);
        await Promise.all(pair.map(({ program }) => program.printed(/(.*\n){10}/, "stdout")));
        const entries = pair.flatMap(({ program }) => program.log);
        const reasons = entries.flatMap(({ reason }) => reason ?? []);
        expect(reasons).toEqual(Array(19).fill("jti used before"));

        // Killed, not stopped: what was answered is stored.
        await Promise.all(pair.map(({ program }) => program.stop()));
        const { program, url } = await started(listeners[2]!);
        expect((await post(url, body)).status).toBe(401);
        expect((await post(url, (await build({}, now, origin)).body)).status).toBe(200);
        await program.printed(/(.*\n){2}/, "stdout");
        expect(program.log[0]!["reason"]).toBe("jti used before");
        await program.stop();
      });
    },
  );
});

test("every algorithm of acceptedAlgorithms has a row", () => {
  expect(algorithms.map(([alg]) => alg)).toEqual(authorizationServer.acceptedAlgorithms);
});
