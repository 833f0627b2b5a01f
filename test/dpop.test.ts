/**
 * Proof of possession, RFC 9449: at the token endpoint (§4.3, §5, §6) and at the API (§7). Each row
 * is one deviation from a valid proof, or from a valid token and its proof. The caller sees only a
 * code, so the log tells which check refused.
 */

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash, KeyObject, sign } from "node:crypto";
import { Database } from "bun:sqlite";
import * as jose from "jose";
import { authorizationServer, type ClientRegistration } from "../config.ts";
import {
  captureLog,
  cleanUp,
  exchange,
  freeOrigin,
  freePort,
  signedJwt,
  temporaryDirectory,
  thumbprint,
  withinOneSecond,
  withModule,
} from "./support.ts";

type Idp = typeof import("../idp.ts");
type Api = typeof import("../api.ts");

// --- Keys ----------------------------------------------------------------------------------------

interface Pair {
  alg: string;
  privateKey: CryptoKey;
  jwk: jose.JWK;
}

async function pair(alg: string): Promise<Pair> {
  const { privateKey, publicKey } = await jose.generateKeyPair(alg, { extractable: true });
  return { alg, privateKey, jwk: await jose.exportJWK(publicKey) };
}

async function withAlgorithm({ privateKey, jwk }: Pair, alg: string): Promise<Pair> {
  const pkcs8 = await jose.exportPKCS8(privateKey);
  return { alg, jwk, privateKey: await jose.importPKCS8(pkcs8, alg) };
}

const key = await pair("ES256");
const otherKey = await pair("ES256");
const privateJwk = await jose.exportJWK(key.privateKey);
const ed25519 = await pair("Ed25519");
const rsa = await pair("RS256");
const mlDsa44 = await pair("ML-DSA-44");
const rsaAlgorithms = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];

/** A key for every algorithm on the allow-list. */
const keys: Pair[] = [
  key,
  await pair("ES384"),
  await pair("ES512"),
  ...(await Promise.all(rsaAlgorithms.map((alg) => withAlgorithm(rsa, alg)))),
  await withAlgorithm(ed25519, "EdDSA"),
  ed25519,
  mlDsa44,
  await pair("ML-DSA-65"),
  await pair("ML-DSA-87"),
];

const secret = Buffer.from("a secret that both sides would have to know");
const hmacKey = await crypto.subtle.importKey(
  "raw",
  secret,
  { name: "HMAC", hash: "SHA-256" },
  false,
  ["sign"],
);
const octJwk = { kty: "oct", k: secret.toString("base64url") };

// --- Proofs --------------------------------------------------------------------------------------

/** What differs from a valid proof. A member that is undefined is left out. */
interface ProofDeviation {
  key?: Pair;
  header?: Record<string, unknown>;
  claims?: Record<string, unknown>;
  /** In seconds from now. */
  iat?: number;
  signing?: CryptoKey | "none";
  /** What is sent instead of a proof; null for no DPoP field at all. */
  dpop?: string | null;
  /** Further fields of the request. */
  headers?: Record<string, string>;
  /** How often it is sent; the last answer counts. */
  sent?: number;
}

let jtis = 0;

async function proofOf(deviation: ProofDeviation, claims: object, now: number): Promise<string> {
  const { key: holder = key, signing = holder.privateKey } = deviation;
  const header = { typ: "dpop+jwt", alg: holder.alg, jwk: holder.jwk, ...deviation.header };
  const iat = now + (deviation.iat ?? 0);
  const all = { jti: `jti ${(jtis += 1)}`, iat, ...claims, ...deviation.claims };
  return await signedJwt(header, all, signing === "none" ? undefined : signing);
}

const embedded = (jwk: object, more = {}): ProofDeviation => ({ header: { jwk, ...more } });
const withMember = (name: string, value: unknown = "AQ") => embedded({ ...key.jwk, [name]: value });

const notAllowed = '"alg" (Algorithm) Header Parameter value not allowed';
const typ = 'unexpected "typ" JWT header value';
const noMatch = "for another request";
const isPrivate = "private key in the header";

type Row<Deviation> = [rule: string, deviation: Deviation];
type RefusedRow<Deviation> = [rule: string, deviation: Deviation, reason: string];

/** Rows name the section alone where it is one of this RFC. */
const ofRfc9449 = <Any extends [string, ...unknown[]]>(rows: Any[]): Any[] =>
  rows.map(([rule, ...rest]) => [rule.replace(/^§/, "RFC 9449 §"), ...rest] as Any);

/** What both servers accept. */
const acceptedProofs = (htu: string): Row<ProofDeviation>[] => [
  ["§4.2 a valid proof", {}],
  ["§4.2 typ with its prefix", { header: { typ: "application/dpop+jwt" } }],
  ["§4.3 htu with a query", { claims: { htu: `${htu}?scope=api1` } }],
  ["§4.3 htu with a fragment", { claims: { htu: `${htu}#top` } }],
  ["§4.3 htu with the scheme in capitals", { claims: { htu: htu.replace("http", "HTTP") } }],
  ["§4.3 htu with a dot segment", { claims: { htu: htu.replace(/(\w)\/(\w)/, "$1/x/../$2") } }],
  [
    "§4.3 htu with dots percent-encoded",
    { claims: { htu: htu.replace(/(\w)\/(\w)/, "$1/%2e/x/%2E%2e/$2") } },
  ],
  [
    "§4.3 Host and X-Forwarded-* of another server",
    {
      headers: {
        host: "other.example",
        "x-forwarded-host": "other.example",
        "x-forwarded-proto": "https",
      },
    },
  ],
  ["§11.1 iat 90 s ago", { iat: -90 }],
  ["§11.1 iat 30 s ahead", { iat: 30 }],
  ["§4.2 a claim that is not known here", { claims: { nonce: "x" } }],
  ...keys.map((each): Row<ProofDeviation> => [`§4.3 alg ${each.alg}`, { key: each }]),
];

/** What both servers refuse, whether the proof is for POST at the one or GET at the other. */
const refusedProofs = (htu: string): RefusedRow<ProofDeviation>[] => [
  ["§4.3 (1) an empty DPoP field", { dpop: "" }, "Invalid Compact JWS"],
  ["§4.3 (2) no JWT", { dpop: "proof" }, "Invalid Compact JWS"],
  ["§4.3 (3) no htm", { claims: { htm: undefined } }, noMatch],
  ["§4.3 (3) no htu", { claims: { htu: undefined } }, "Invalid URL"],
  ["§4.2 htu in a list", { claims: { htu: [htu] } }, "Invalid URL"],
  ["§4.3 (3) no iat", { claims: { iat: undefined } }, "iat too far from now"],
  ["§4.3 (3) no jti", { claims: { jti: undefined } }, "no jti"],
  ["§4.3 (3) an empty jti", { claims: { jti: "" } }, "no jti"],
  ["§4.3 (3) jti a number", { claims: { jti: 7 } }, "no jti"],
  ["§4.3 (3) iat a string", { claims: { iat: "0" } }, '"iat" claim must be a number'],
  ["§4.3 (4) no typ", { header: { typ: undefined } }, typ],
  ["§4.3 (4) typ JWT", { header: { typ: "JWT" } }, typ],
  ["§4.3 (5) alg none", { header: { alg: "none" }, signing: "none" }, notAllowed],
  [
    "§4.3 (5) alg HS256 with a symmetric key in the header",
    { header: { alg: "HS256", jwk: octJwk }, signing: hmacKey },
    notAllowed,
  ],
  [
    "§4.3 (5) a symmetric key in the header",
    embedded(octJwk),
    'Invalid or unsupported JWK "alg" (Algorithm) Parameter value',
  ],
  [
    "§4.3 (6) signed with another key",
    { signing: otherKey.privateKey },
    "signature verification failed",
  ],
  ["§4.3 (6) no signature", { signing: "none" }, "signature verification failed"],
  [
    "§4.3 (6) no jwk",
    { header: { jwk: undefined } },
    '"jwk" (JSON Web Key) Header Parameter must be a JSON object',
  ],
  [
    "§4.3 (6) kid instead of jwk",
    { header: { jwk: undefined, kid: thumbprint(key.jwk) } },
    '"jwk" (JSON Web Key) Header Parameter must be a JSON object',
  ],
  [
    "§4.3 (7) the private key in the header",
    embedded(privateJwk),
    '"jwk" (JSON Web Key) Header Parameter must be a public key',
  ],
  ["§4.3 (7) jwk with d", { key: mlDsa44, header: { jwk: { ...mlDsa44.jwk, d: "" } } }, isPrivate],
  ["§4.3 (7) jwk with p", withMember("p"), isPrivate],
  ["§4.3 (7) jwk with q", withMember("q"), isPrivate],
  ["§4.3 (7) jwk with dp", withMember("dp"), isPrivate],
  ["§4.3 (7) jwk with dq", withMember("dq"), isPrivate],
  ["§4.3 (7) jwk with qi", withMember("qi"), isPrivate],
  ["§4.3 (7) jwk with oth", withMember("oth", []), isPrivate],
  ["§4.3 (7) jwk with k", withMember("k"), isPrivate],
  ["§4.3 (7) jwk with priv", withMember("priv", ""), isPrivate],
  [
    "§4.3 (7) an RSA key with p and q",
    { key: rsa, header: { jwk: { ...rsa.jwk, p: "AQ", q: "AQ" } } },
    isPrivate,
  ],
  ["§4.3 (8) htm of another method", { claims: { htm: "PUT" } }, noMatch],
  ["§4.3 (9) htu of another path", { claims: { htu: `${htu}s` } }, noMatch],
  ["§4.3 (9) htu with a slash at the end", { claims: { htu: `${htu}/` } }, noMatch],
  ["§4.3 (9) htu of the whole server", { claims: { htu: new URL(htu).origin } }, noMatch],
  ["§4.3 (9) htu of another host", { claims: { htu: htu.replace("127.0.0.1", "[::1]") } }, noMatch],
  ["§4.3 (9) htu of another port", { claims: { htu: htu.replace(/:\d+/, "") } }, noMatch],
  ["§4.3 (9) htu of https", { claims: { htu: htu.replace("http:", "https:") } }, noMatch],
  ["§4.3 (9) htu without a host", { claims: { htu: new URL(htu).pathname } }, "Invalid URL"],
  [
    "§4.3 (9) htu as Host and X-Forwarded-* say",
    {
      claims: { htu: htu.replace(/\/\/[^/]+/, "//other.example") },
      headers: { host: "other.example", "x-forwarded-host": "other.example" },
    },
    noMatch,
  ],
  [
    "§4.3 (9) htu as X-Forwarded-Proto says",
    {
      claims: { htu: htu.replace("http:", "https:") },
      headers: { "x-forwarded-proto": "https" },
    },
    noMatch,
  ],
  ["§4.3 (11) iat 91 s ago", { iat: -91 }, "iat too far from now"],
  ["§4.3 (11) iat 31 s ahead", { iat: 31 }, "iat too far from now"],
  ["§11.1 sent a second time", { sent: 2 }, "jti used before"],
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

// --- Servers -------------------------------------------------------------------------------------

const issuer = freeOrigin();
const tokenEndpoint = `${issuer}/connect/token`;
const database = `${temporaryDirectory()}/keys.db`;
const client: ClientRegistration = {
  ...authorizationServer.clients[0]!,
  grant_types: ["client_credentials"],
};
const clients: ClientRegistration[] = [
  client,
  { ...client, client_id: "bound", dpop_bound_access_tokens: true },
];
const stops: (() => Promise<void>)[] = [];
const log = captureLog();
/** How many lines the requests so far make the servers log. */
let lines = 0;

async function startIdp(changes: Partial<typeof authorizationServer>, listen?: string) {
  const configuration = { issuer, clients, databaseUrl: `sqlite://${database}`, ...changes };
  const start = async (module: Idp) => await module.start();
  if (listen) process.env["ISSUER_LISTEN"] = listen;
  const server = await withModule("idp", { authorizationServer: configuration }, start).finally(
    () => delete process.env["ISSUER_LISTEN"],
  );
  stops.push(() => server.stop(true));
}

/** A foreign authorization server: the tests sign its tokens. */
const tokenKey = await pair("ES256");
const jwks = { keys: [{ ...tokenKey.jwk, kid: "foreign", alg: "ES256", use: "sig" }] };
const foreignIssuer = freeOrigin();
const foreignMetadata = { issuer: foreignIssuer, jwks_uri: `${foreignIssuer}/jwks` };
const foreign = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(new URL(foreignIssuer).port),
  fetch: ({ url }) => Response.json(url.endsWith("/jwks") ? jwks : foreignMetadata),
});
stops.push(() => foreign.stop(true));

const resource = freeOrigin();
const identity = `${resource}/identity`;

async function startApi(changes: object, listen?: string): Promise<Api> {
  const configuration = { resource, issuer: foreignIssuer, ...changes };
  if (listen) process.env["API_LISTEN"] = listen;
  const start = async (module: Api) => {
    const server = await module.start();
    stops.push(() => server.stop(true));
    return module;
  };
  return await withModule("api", { resourceServer: configuration }, start).finally(
    () => delete process.env["API_LISTEN"],
  );
}

afterAll(async () => {
  log.stop();
  await Promise.all(stops.map((stop) => stop()));
  await cleanUp();
});

const sha256 = (text: string) => createHash("sha256").update(text).digest("base64url");
const seconds = () => Math.floor(Date.now() / 1000);

// --- Token endpoint ------------------------------------------------------------------------------

interface TokenDeviation extends ProofDeviation {
  client_id?: string;
  form?: Record<string, string>;
}

interface Answer {
  status: number;
  headers: Record<string, string>;
  body: string;
  line: number;
}

async function answered(response: Response): Promise<Answer> {
  const { date, "content-length": length, ...headers } = response.headers.toJSON();
  return { status: response.status, headers, body: await response.text(), line: lines - 1 };
}

async function requestToken(proof: string | null, deviation: TokenDeviation = {}, url?: string) {
  const { client_id = "client", form, headers } = deviation;
  const fields = { grant_type: "client_credentials", client_id, client_secret: "secret", ...form };
  const response = await fetch(url ?? tokenEndpoint, {
    method: "POST",
    body: new URLSearchParams(fields),
    headers: { ...headers, ...(proof !== null && { dpop: proof }) },
  });
  lines += 1;
  return await answered(response);
}

/** Builds and sends what a row says; again if it depends on the second and the clock ticked. */
async function runRow<Deviation extends ProofDeviation>(
  deviation: Deviation,
  send: (now: number) => Promise<() => Promise<Answer>>,
): Promise<Answer> {
  const run = async (now: number) => {
    const again = await send(now);
    for (let left = (deviation.sent ?? 1) - 1; left > 0; left--) await again();
    return await again();
  };
  return await (deviation.iat ? withinOneSecond(run) : run(seconds()));
}

const runTokenRow = (deviation: TokenDeviation) =>
  runRow(deviation, async (now) => {
    const claims = { htm: "POST", htu: tokenEndpoint };
    const { dpop = await proofOf(deviation, claims, now) } = deviation;
    return () => requestToken(dpop, deviation);
  });

const acceptedAtTokenEndpoint: Row<TokenDeviation>[] = [
  ...acceptedProofs(tokenEndpoint),
  ["§5.2 a client that must send one", { client_id: "bound" }],
  ["§11.1 the jti of another key", { key: otherKey, claims: { jti: "shared" } }],
  ["§11.1 the same jti from this key", { claims: { jti: "shared" } }],
];

const refusedAtTokenEndpoint: RefusedRow<TokenDeviation>[] = [
  ...refusedProofs(tokenEndpoint),
  [
    "§5.2 no proof, of a client that must",
    { client_id: "bound", dpop: null },
    "Invalid Compact JWS",
  ],
  ["§4.3 (8) htm post", { claims: { htm: "post" } }, noMatch],
  ["§4.3 (8) htm GET", { claims: { htm: "GET" } }, noMatch],
  ["§11.1 the jti of another proof", { claims: { jti: "shared" } }, "jti used before"],
  ["the proof before the scope", { iat: -91, form: { scope: "nothing" } }, "iat too far from now"],
];

const noStore = { "cache-control": "no-store", pragma: "no-cache" };
const json = { ...noStore, "content-type": "application/json;charset=utf-8" };
const answers = new Map<ProofDeviation, Answer>();

describe("POST /connect/token", () => {
  const second = `127.0.0.1:${freePort()}`;
  const proxied = `127.0.0.1:${freePort()}`;
  const strict = freeOrigin();

  beforeAll(async () => {
    await startIdp({});
    await startIdp({}, second);
    const separate = () => `sqlite://${temporaryDirectory()}/keys.db`;
    await startIdp({ issuer: "https://localhost", databaseUrl: separate() }, proxied);
    await startIdp({ issuer: strict, databaseUrl: separate(), acceptedAlgorithms: ["ES256"] });
    for (const [, deviation] of [...acceptedAtTokenEndpoint, ...refusedAtTokenEndpoint]) {
      answers.set(deviation, await runTokenRow(deviation));
    }
    await log.until(lines);
  });

  test.each(ofRfc9449(acceptedAtTokenEndpoint))("%s → 200 token_type DPoP", (_, deviation) => {
    const { status, headers, body, line } = answers.get(deviation)!;
    expect(log.requests[line]).not.toContainKeys(["error", "reason"]);
    expect(status).toBe(200);
    expect(headers).toEqual(json);
    const { access_token, ...rest } = JSON.parse(body);
    expect(rest).toEqual({ token_type: "DPoP", expires_in: 3600, scope: "api1" });
    const { alg, jwk } = deviation.key ?? key;
    // RFC 9449 §6.1: one member, the thumbprint. That of an AKP key includes its alg.
    expect(jose.decodeJwt(access_token)["cnf"]).toEqual({ jkt: thumbprint({ alg, ...jwk }) });
  });

  test.each(ofRfc9449(refusedAtTokenEndpoint))(
    "%s → 400 invalid_dpop_proof",
    (_, deviation, reason) => {
      const { status, headers, body, line } = answers.get(deviation)!;
      expect(log.requests[line]).toMatchObject({
        event: "token refused",
        client_id: deviation.client_id ?? "client",
        error: "invalid_dpop_proof",
        reason,
      });
      expect(status).toBe(400);
      expect(headers).toEqual(json);
      expect(JSON.parse(body)).toEqual({
        error: "invalid_dpop_proof",
        error_description: "The DPoP proof is missing or not valid.",
      });
    },
  );

  test("RFC 9449 §5 without a proof → 200 token_type Bearer", async () => {
    const { status, body } = await requestToken(null);
    expect(status).toBe(200);
    expect(JSON.parse(body)).toMatchObject({ token_type: "Bearer" });
    expect(jose.decodeJwt(JSON.parse(body).access_token)).not.toHaveProperty("cnf");
  });

  test("the grant type comes before the proof → 400 unsupported_grant_type", async () => {
    const { status, body } = await requestToken("proof", { form: { grant_type: "password" } });
    expect([status, JSON.parse(body).error]).toEqual([400, "unsupported_grant_type"]);
  });

  test("RFC 9449 §4.3 (1) two DPoP fields → 400 invalid_dpop_proof", async () => {
    const claims = { htm: "POST", htu: tokenEndpoint };
    const [one, two] = [await proofOf({}, claims, seconds()), await proofOf({}, claims, seconds())];
    const body = "grant_type=client_credentials&client_id=client&client_secret=secret";
    const fields = [
      `Host: ${new URL(issuer).host}`,
      "Content-Type: application/x-www-form-urlencoded",
      `Content-Length: ${body.length}`,
      `DPoP: ${one}`,
      "Connection: close",
    ];
    const send = (more: string[]) =>
      exchange(issuer, ["POST /connect/token HTTP/1.1", ...fields, ...more, "", body].join("\r\n"));
    const refused = await send([`DPoP: ${two}`]);
    expect(refused).toStartWith("HTTP/1.1 400 Bad Request\r\n");
    expect(refused).toContain('{"error":"invalid_dpop_proof"');
    // It was not looked at, so it is not used up.
    expect(await send([])).toStartWith("HTTP/1.1 200 OK\r\n");
    lines += 2;
  });

  test("RFC 9449 §11.1 a used jti is a row until the proof is too old", async () => {
    const iat = seconds() - 5;
    const deviation = { claims: { iat, jti: "a row" } };
    expect((await runTokenRow(deviation)).status).toBe(200);
    const id = sha256(JSON.stringify(["dpop", thumbprint(key.jwk), tokenEndpoint, "a row"]));
    const opened = new Database(database, { readonly: true });
    const rows = opened.query("SELECT * FROM used_jtis WHERE id = ?").all(id);
    opened.close();
    expect(rows).toEqual([{ id, expires_at: iat + 90 }]);
  });

  test("RFC 9449 §11.1 at two servers with one database, 20 at once → one token", async () => {
    const proof = await proofOf({}, { htm: "POST", htu: tokenEndpoint }, seconds());
    const urls = [tokenEndpoint, `http://${second}/connect/token`];
    const sent = Array.from({ length: 20 }, (_, index) => requestToken(proof, {}, urls[index % 2]));
    const statuses = (await Promise.all(sent)).map(({ status }) => status);
    expect(statuses.toSorted()).toEqual([200, ...Array(19).fill(400)]);
  });

  test.each([
    ["https://localhost/connect/token", 200],
    ["HTTPS://LOCALHOST:443/connect/token", 200],
    ["https://localhost:5001/connect/token", 400],
    ["http://localhost/connect/token", 400],
    ["http://127.0.0.1/connect/token", 400],
  ])("RFC 9449 §4.3 behind a proxy, htu %s → %d", async (htu, status) => {
    const proof = await proofOf({}, { htm: "POST", htu }, seconds());
    const answer = await requestToken(proof, {}, `http://${proxied}/connect/token`);
    expect(answer.status).toBe(status);
  });

  test("RFC 9449 §4.3 (5) an alg that acceptedAlgorithms does not have → 400", async () => {
    const url = `${strict}/connect/token`;
    const send = async (pair: Pair) =>
      requestToken(await proofOf({ key: pair }, { htm: "POST", htu: url }, seconds()), {}, url);
    const { status, line } = await send(ed25519);
    expect([status, (await send(key)).status]).toEqual([400, 200]);
    await log.until(lines);
    expect(log.requests[line]).toMatchObject({ error: "invalid_dpop_proof", reason: notAllowed });
  });
});

// --- API -----------------------------------------------------------------------------------------

interface CallDeviation extends ProofDeviation {
  /** What differs from a valid token that is bound to the proof's key. */
  token?: Record<string, unknown>;
  scheme?: string;
  method?: string;
}

async function foreignToken(claims: Record<string, unknown>, aud = resource, kid = "foreign") {
  const iat = seconds();
  const jti = `token ${(jtis += 1)}`;
  const valid = { iss: foreignIssuer, sub: "caller", aud, client_id: "caller", scope: "api1" };
  const header = { typ: "at+jwt", alg: "ES256", kid };
  return await signedJwt(
    header,
    { ...valid, iat, exp: iat + 60, jti, ...claims },
    tokenKey.privateKey,
  );
}

async function call(url: string, headers: Record<string, string>, method = "GET") {
  const response = await fetch(url, { method, headers });
  if (response.status !== 200) lines += 1;
  return await answered(response);
}

const runCallRow = (deviation: CallDeviation) =>
  runRow(deviation, async (now) => {
    const { alg, jwk } = deviation.key ?? key;
    const { scheme = "DPoP", token, method = "GET", headers } = deviation;
    const jkt = thumbprint({ alg, ...jwk });
    const accessToken = await foreignToken({ cnf: { jkt }, ...token });
    const claims = { htm: method, htu: identity, ath: sha256(accessToken) };
    const { dpop = await proofOf(deviation, claims, now) } = deviation;
    const fields = { ...headers, ...(dpop !== null && { dpop }) };
    return () => call(identity, { ...fields, authorization: `${scheme} ${accessToken}` }, method);
  });

const acceptedAtApi: Row<CallDeviation>[] = [
  ...acceptedProofs(identity),
  ["§7.1 the scheme in small letters", { scheme: "dpop" }],
  ["§7.2 an unbound token as Bearer", { scheme: "Bearer", dpop: null, token: { cnf: undefined } }],
  ["§7.1 HEAD", { method: "HEAD" }],
  ["§11.1 the jti of another key", { key: otherKey, claims: { jti: "shared" } }],
  ["§11.1 the same jti from this key", { claims: { jti: "shared" } }],
];

const refusedAtApi: RefusedRow<CallDeviation>[] = [
  ...refusedProofs(identity),
  ["§7.1 no proof", { dpop: null }, "Invalid Compact JWS"],
  ["§4.3 (8) htm get", { claims: { htm: "get" } }, noMatch],
  ["§4.3 (8) htm POST", { claims: { htm: "POST" } }, noMatch],
  ["§4.3 (8) htm GET with HEAD", { method: "HEAD", claims: { htm: "GET" } }, noMatch],
  ["§4.3 (12) no ath", { claims: { ath: undefined } }, "ath of another token"],
  ["§4.3 (12) ath of another token", { claims: { ath: sha256("token") } }, "ath of another token"],
  [
    "§4.3 (12) another key than the token's",
    { token: { cnf: { jkt: thumbprint(otherKey.jwk) } } },
    "not the key that the token is bound to",
  ],
  ["§11.1 the jti of another proof", { claims: { jti: "shared" } }, "jti used before"],
];

const otherScheme = "the other scheme";
const unknownWay = "bound in an unknown way";
const invalidTokens: RefusedRow<CallDeviation>[] = [
  ["§7.2 a bound token as Bearer, without a proof", { scheme: "Bearer", dpop: null }, otherScheme],
  ["§7.2 a bound token as Bearer, with its proof", { scheme: "Bearer" }, otherScheme],
  ["§7.1 an unbound token as DPoP", { token: { cnf: undefined } }, otherScheme],
  ["RFC 7800 §3 cnf without a member", { token: { cnf: {} } }, unknownWay],
  ["RFC 7800 §3 cnf null", { token: { cnf: null } }, unknownWay],
  ["RFC 7800 §3 cnf a string", { token: { cnf: thumbprint(key.jwk) } }, unknownWay],
  ["RFC 7800 §3 cnf with an empty jkt", { token: { cnf: { jkt: "" } } }, unknownWay],
  ["RFC 8705 §3.1 bound to a certificate", { token: { cnf: { "x5t#S256": "x" } } }, unknownWay],
  [
    "RFC 8705 §3.1 bound to a certificate, as Bearer",
    { scheme: "Bearer", dpop: null, token: { cnf: { "x5t#S256": "x" } } },
    unknownWay,
  ],
  [
    "RFC 7800 §3.2 bound to a key in jwk, as Bearer",
    { scheme: "Bearer", dpop: null, token: { cnf: { jwk: key.jwk } } },
    unknownWay,
  ],
];

/** The challenges by scheme, each with its parameters. */
function challenges(field: string | undefined): Record<string, Record<string, string>> {
  const parameter = String.raw`\w+="[^"]*"`;
  const one = String.raw`(\w+) (${parameter}(?:, ${parameter})*)`;
  expect(field).toMatch(new RegExp(`^${one}, ${one}$`));
  const all = [...field!.matchAll(new RegExp(one, "g"))].map(([, scheme, parameters]) => {
    const pairs = [...parameters!.matchAll(/(\w+)="([^"]*)"/g)];
    return [scheme, Object.fromEntries(pairs.map(([, name, value]) => [name, value]))];
  });
  return Object.fromEntries(all);
}

const where = { resource_metadata: `${resource}/.well-known/oauth-protected-resource` };
const algs = authorizationServer.acceptedAlgorithms.join(" ");
const invalidToken = "The access token is not valid here. The log of the API has the reason.";

describe("GET /identity", () => {
  const proxied = `127.0.0.1:${freePort()}`;
  const strict = freeOrigin();

  beforeAll(async () => {
    await startApi({});
    await startApi({ resource: "https://localhost" }, proxied);
    await startApi({ resource: strict, acceptedAlgorithms: ["ES256"] });
    for (const [, deviation] of [...acceptedAtApi, ...refusedAtApi, ...invalidTokens]) {
      answers.set(deviation, await runCallRow(deviation));
    }
    await log.until(lines);
  });

  test.each(ofRfc9449(acceptedAtApi))("%s → 200", (_, deviation) => {
    const { status, headers, body } = answers.get(deviation)!;
    expect(status).toBe(200);
    expect(headers).toEqual({ "cache-control": "no-store", "content-type": "application/json" });
    if (deviation.method === "HEAD") return;
    if (deviation.token) return expect(body).not.toContain('"cnf"');
    const { alg, jwk } = deviation.key ?? key;
    const value = JSON.stringify({ jkt: thumbprint({ alg, ...jwk }) });
    expect(JSON.parse(body)).toContainEqual({ type: "cnf", value });
  });

  test.each(ofRfc9449(refusedAtApi))("%s → 401 invalid_dpop_proof", (_, deviation, reason) => {
    const { status, headers, body, line } = answers.get(deviation)!;
    const { event, error, address, ...rest } = log.requests[line]!;
    expect(rest["reason"]).toBe(reason);
    expect([event, error, address]).toEqual(["call refused", "invalid_dpop_proof", "127.0.0.1"]);
    expect(status).toBe(401);
    const error_description = "The DPoP proof is missing or not valid.";
    if (deviation.method !== "HEAD") expect(body).toBe(error_description);
    expect(headers["cache-control"]).toBe("no-store");
    expect(challenges(headers["www-authenticate"])).toEqual({
      Bearer: where,
      DPoP: { algs, ...where, error: "invalid_dpop_proof", error_description },
    });
  });

  test.each(ofRfc9449(invalidTokens))("%s → 401 invalid_token", (_, deviation, reason) => {
    const { status, headers, body, line } = answers.get(deviation)!;
    const { event, error, ...rest } = log.requests[line]!;
    expect([event, error, rest["reason"]]).toEqual(["call refused", "invalid_token", reason]);
    expect([status, body]).toEqual([401, invalidToken]);
    const why = { error: "invalid_token", error_description: invalidToken };
    expect(challenges(headers["www-authenticate"])).toEqual({
      Bearer: { ...where, ...(deviation.scheme === "Bearer" && why) },
      DPoP: { algs, ...where, ...(deviation.scheme !== "Bearer" && why) },
    });
  });

  test("RFC 9449 §7.1 every call with a token that is remembered needs a new proof", async () => {
    const token = await foreignToken({ cnf: { jkt: thumbprint(key.jwk) } });
    const claims = { htm: "GET", htu: identity, ath: sha256(token) };
    const send = async (dpop: string, scheme = "DPoP") =>
      (await call(identity, { authorization: `${scheme} ${token}`, dpop })).status;
    const [one, two] = [await proofOf({}, claims, seconds()), await proofOf({}, claims, seconds())];
    expect(await send(one)).toBe(200);
    expect(await send(one)).toBe(401);
    expect(await send(two, "Bearer")).toBe(401);
    expect(await send("")).toBe(401);
    expect(await send(two)).toBe(200);
  });

  test("RFC 9449 §11.1 one proof sent 20 times at once → exactly one 200", async () => {
    const token = await foreignToken({ cnf: { jkt: thumbprint(key.jwk) } });
    const claims = { htm: "GET", htu: identity, ath: sha256(token) };
    const headers = {
      authorization: `DPoP ${token}`,
      dpop: await proofOf({}, claims, seconds()),
    };
    const sent = Array.from({ length: 20 }, () => call(identity, headers));
    const statuses = (await Promise.all(sent)).map(({ status }) => status);
    expect(statuses.toSorted()).toEqual([200, ...Array(19).fill(401)]);
  });

  test("RFC 9449 §4.3 (1) two DPoP fields → 401 invalid_dpop_proof", async () => {
    const token = await foreignToken({ cnf: { jkt: thumbprint(key.jwk) } });
    const claims = { htm: "GET", htu: identity, ath: sha256(token) };
    const [one, two] = [await proofOf({}, claims, seconds()), await proofOf({}, claims, seconds())];
    const fields = `Host: ${new URL(resource).host}\r\nAuthorization: DPoP ${token}\r\nDPoP: ${one}`;
    const send = (more: string) =>
      exchange(resource, `GET /identity HTTP/1.1\r\n${fields}\r\n${more}Connection: close\r\n\r\n`);
    const refused = await send(`DPoP: ${two}\r\n`);
    lines += 1;
    expect(refused).toStartWith("HTTP/1.1 401 Unauthorized\r\n");
    expect(refused).toContain('error="invalid_dpop_proof"');
    expect(await send("")).toStartWith("HTTP/1.1 200 OK\r\n");
  });

  test.each([
    ["https://localhost/identity", 200],
    ["HTTPS://LOCALHOST:443/identity", 200],
    ["https://localhost:6001/identity", 401],
    ["http://localhost/identity", 401],
    ["http://127.0.0.1/identity", 401],
  ])("RFC 9449 §4.3 behind a proxy, htu %s → %d", async (htu, status) => {
    const cnf = { jkt: thumbprint(key.jwk) };
    const token = await foreignToken({ cnf }, "https://localhost");
    const dpop = await proofOf({}, { htm: "GET", htu, ath: sha256(token) }, seconds());
    const headers = { authorization: `DPoP ${token}`, dpop };
    expect((await call(`http://${proxied}/identity`, headers)).status).toBe(status);
  });

  test("RFC 9449 §4.3 (5) an alg that acceptedAlgorithms does not have → 401", async () => {
    const url = `${strict}/identity`;
    const send = async (pair: Pair) => {
      const token = await foreignToken({ cnf: { jkt: thumbprint(pair.jwk) } }, strict);
      const claims = { htm: "GET", htu: url, ath: sha256(token) };
      const dpop = await proofOf({ key: pair }, claims, seconds());
      return await call(url, { authorization: `DPoP ${token}`, dpop });
    };
    const { status, headers, line } = await send(ed25519);
    expect([status, (await send(key)).status]).toEqual([401, 200]);
    const { DPoP } = challenges(headers["www-authenticate"]);
    expect(DPoP).toMatchObject({ error: "invalid_dpop_proof", algs: "ES256" });
    await log.until(lines);
    expect(log.requests[line]).toMatchObject({ error: "invalid_dpop_proof", reason: notAllowed });
  });

  test("RFC 9449 §6 a token of the authorization server is bound to the proof's key", async () => {
    const origin = freeOrigin();
    const scopes = [{ scope: "api1", description: "My API", resource: origin }];
    const own = freeOrigin();
    const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
    await startIdp({ issuer: own, scopes, databaseUrl });
    await startApi({ issuer: own, resource: origin });
    const htu = `${own}/connect/token`;
    const proof = await proofOf({}, { htm: "POST", htu }, seconds());
    const { access_token: token } = JSON.parse((await requestToken(proof, {}, htu)).body);
    const url = `${origin}/identity`;
    const claims = { htm: "GET", htu: url, ath: sha256(token) };
    const send = async (pair: Pair, scheme: string) => {
      const dpop = await proofOf({ key: pair }, claims, seconds());
      return (await call(url, { authorization: `${scheme} ${token}`, dpop })).status;
    };
    expect(await send(otherKey, "DPoP")).toBe(401);
    expect(await send(key, "Bearer")).toBe(401);
    expect(await send(key, "DPoP")).toBe(200);
  });
});

// --- Used proofs at the API ----------------------------------------------------------------------

describe("authorize", () => {
  const { jwk } = ed25519;
  const privateKey = KeyObject.from(ed25519.privateKey);
  const header = { typ: "dpop+jwt", alg: "EdDSA", jwk };
  let api: Api;
  let token: string;

  beforeAll(async () => {
    api = await withModule(
      "api",
      { resourceServer: { resource, issuer: foreignIssuer } },
      async (module: Api) => module,
    );
    token = await foreignToken({ cnf: { jkt: thumbprint(jwk) } });
  });

  /** Signed without waiting, which is the fastest way. */
  function proof(jti: string, path = "/identity"): string {
    const claims = { htm: "GET", htu: resource + path, ath: sha256(token), iat: seconds(), jti };
    const parts = [header, claims].map((part) => Buffer.from(JSON.stringify(part)));
    const input = parts.map((part) => part.toString("base64url")).join(".");
    return `${input}.${sign(null, Buffer.from(input), privateKey).toString("base64url")}`;
  }

  async function authorized(dpop: string, path = "/identity"): Promise<string> {
    const headers = { authorization: `DPoP ${token}`, dpop };
    try {
      await api.authorize(new Request(resource + path, { headers }), "api1");
      return "accepted";
    } catch (error) {
      return (error as Error).message;
    }
  }

  test("RFC 9449 §11.1 a jti is used up for one htu alone", async () => {
    expect(await authorized(proof("one"), "/identity")).toBe("accepted");
    expect(await authorized(proof("one", "/other"), "/other")).toBe("accepted");
    expect(await authorized(proof("one"), "/identity")).toBe("jti used before");
  });

  test("RFC 9449 §4.3 (9) htu is compared in its normal form, the request's query left out", async () => {
    const path = "/a%20b/c";
    expect(await authorized(proof("two", "/a b/c"), path)).toBe("accepted");
    expect(await authorized(proof("three", "/a%20b/x/../c"), `${path}?x=1`)).toBe("accepted");
    expect(await authorized(proof("four", "/a/c"), path)).toBe("for another request");
  });

  test("RFC 9068 §4 a token of a removed key is refused, also if calls with it are under way", async () => {
    const own = freeOrigin();
    const withKid = (kid: string) => ({ ...tokenKey.jwk, kid });
    let published = [withKid("removed")];
    const keyServer = Bun.serve({
      hostname: "127.0.0.1",
      port: Number(new URL(own).port),
      fetch: ({ url }) =>
        Response.json(
          url.endsWith("/jwks") ? { keys: published } : { issuer: own, jwks_uri: `${own}/jwks` },
        ),
    });
    stops.push(() => keyServer.stop(true));
    const settings = { resource, issuer: own, coolDownSeconds: 0 };
    api = await withModule("api", { resourceServer: settings }, async (module: Api) => module);
    token = await foreignToken({ iss: own, cnf: { jkt: thumbprint(jwk) } }, resource, "removed");
    expect(await authorized(proof("before"))).toBe("accepted");

    published = [withKid("added")];
    let changing = true;
    const callers = Array.from({ length: 8 }, async (_, caller) => {
      for (let n = 0; changing; n++) await authorized(proof(`${caller} ${n}`));
    });
    // A token with a kid that is not known yet makes the API fetch the keys.
    const authorization = `Bearer ${await foreignToken({ iss: own }, resource, "added")}`;
    await api.authorize(new Request(identity, { headers: { authorization } }), "api1");
    changing = false;
    await Promise.all(callers);
    const reason = "no applicable key found in the JSON Web Key Set";
    expect(await authorized(proof("after"))).toBe(reason);
  });

  test("RFC 9449 §11.1 the last 50,000 used proofs are remembered, the oldest forgotten first", async () => {
    const fresh = await withModule(
      "api",
      { resourceServer: { resource, issuer: foreignIssuer } },
      async (module: Api) => module,
    );
    api = fresh;
    token = await foreignToken({ cnf: { jkt: thumbprint(jwk) } });
    const [oldest, second] = [proof("0"), proof("1")];
    expect(await authorized(oldest)).toBe("accepted");
    expect(await authorized(second)).toBe("accepted");
    for (let used = 2; used < 50_000; used += 100) {
      const proofs = Array.from({ length: Math.min(100, 50_000 - used) }, (_, i) =>
        proof(`${used + i}`),
      );
      const results = await Promise.all(proofs.map((each) => authorized(each)));
      expect(new Set(results)).toEqual(new Set(["accepted"]));
    }
    expect(await authorized(oldest)).toBe("jti used before");
    expect(await authorized(proof("50000"))).toBe("accepted");
    expect(await authorized(second)).toBe("jti used before");
    expect(await authorized(oldest)).toBe("accepted");
  }, 60_000);
});

test("every algorithm of acceptedAlgorithms has a row", () => {
  expect(keys.map(({ alg }) => alg)).toEqual(authorizationServer.acceptedAlgorithms);
});
