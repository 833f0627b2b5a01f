/** The API: which tokens it takes (RFC 6750, RFC 9068), what it tells (RFC 9728), whose keys it trusts. */

import { cpSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import { resourceServer, type ResourceServerSettings as Settings } from "../../config.ts";
import { type Answer, callRefusalOf, challenges, form, padded } from "../support/http.ts";
import { raw, rowsOf, send, zipped } from "../support/http.ts";
import { eventually } from "../support/databases.ts";
import { accessToken, Issuer, type Key, key, proof } from "../support/jwt.ts";
import { secondsNow, signSymmetric } from "../support/jwt.ts";
import { root, temporaryDirectory } from "../support/programs.ts";
import { api as startApi } from "../support/servers.ts";

const [signer, stranger] = [await key("ES256", "key"), await key("ES256", "stranger")];
const [rsa, es384] = [await key("RS256", "rsa"), await key("ES384", "es384")];

/** The clock of the API stands still, in the last millisecond of a second. */
const now = secondsNow();
const clock = () => now * 1000 + 999;

const issuer = new Issuer([]);
issuer.publish(
  ...[signer, rsa, es384].map(({ publicJwk }) => publicJwk),
  { ...rsa.publicJwk, kid: "rs512", alg: "RS512" },
  { ...stranger.publicJwk, kid: "enc", use: "enc" },
);
const api = await startApi(issuer.url, { clock });
const identity = `${api.url}/identity`;
const [iss, aud] = [issuer.url, api.url];
const other = "https://other.example";
const algs = resourceServer.acceptedAlgorithms.join(" ");

type Members = Record<string, unknown>;
const made: string[] = [];

/** A token for the API, all of which are kept to look for them in the log. */
async function token(claims: Members = {}, header: Members = {}, by = signer): Promise<string> {
  made.push(await accessToken(by, iss, aud, claims, header));
  return made.at(-1)!;
}

const call = (authorization?: string, url = identity) =>
  send(url, authorization === undefined ? {} : { headers: { authorization } });
const bearer = async (presented: string | Promise<string>, url = identity) =>
  await call(`Bearer ${await presented}`, url);

const fields = ({ status, headers }: Answer, ...names: string[]) => [
  status,
  ...names.map((name) => headers.get(name)),
];

const sentence = /^["\w]+( \S+){2,}/;

/** Expects a refusal, and a line about it in the log. */
function expectRefusal(answer: Answer, expected: string, said = sentence) {
  expect(callRefusalOf(answer)).toBe(expected);
  const [, error = "no_credentials"] = expected.split(" ");
  const line = { event: "call refused", error, address: "127.0.0.1" };
  const { reason, ...others } = api.lines.at(-1)!; // toMatchObject would put the matcher in place
  expect(others).toMatchObject(line);
  expect(reason).toMatch(said);
}

/** RFC 9110 §15.6.4: the caller shall keep the token and come again. */
function expectUnavailable(answer: Answer, retryAfter = "5") {
  const seen = fields(answer, "retry-after", "cache-control", "www-authenticate");
  expect(seen).toEqual([503, retryAfter, "no-store", null]);
  expect(answer.text).toMatch(/^[ -~]{10,}$/);
}

function expectJson(answer: Answer) {
  const expected = [200, "application/json", "no-store"];
  expect(fields(answer, "content-type", "cache-control")).toEqual(expected);
}

// --- How a token is presented --------------------------------------------------------------------

type Field = (token: string) => string | undefined;
const presented: Record<string, [rule: string, field: Field][]> = {
  "200": [
    ["RFC 6750 §2.1 a valid token", (token) => `Bearer ${token}`],
    ["RFC 9110 §11.1 the scheme in small letters", (token) => `bearer ${token}`],
    ["RFC 9110 §11.4 several spaces after the scheme", (token) => `Bearer   ${token}`],
  ],
  // RFC 6750 §3.1: without an error, for nothing of that kind was sent.
  "401": [
    ["RFC 6750 §3.1 no Authorization field", () => undefined],
    ["RFC 6750 §3.1 an empty Authorization field", () => ""],
    ["RFC 6750 §3.1 another scheme with the token", (token) => `Token ${token}`],
    ["RFC 6750 §3.1 a scheme that begins like Bearer", (token) => `Bearers ${token}`],
    ["RFC 6750 §3.1 a scheme that ends like Bearer", (token) => `XBearer ${token}`],
    ["RFC 6750 §3.1 no space after Bearer", (token) => `Bearer${token}`],
    ["RFC 6750 §3.1 a token without a scheme", (token) => token],
    ["RFC 6750 §3.1 another scheme with Bearer as its credentials", () => "Digest Bearer"],
  ],
  "400 invalid_request at bearer": [
    ["RFC 6750 §3.1 no token", () => "Bearer"],
    ["RFC 6750 §3.1 a character outside b64token", (token) => `Bearer ${token}!`],
    ["RFC 6750 §3.1 = within the token", (token) => `Bearer a=${token}`],
    ["RFC 6750 §3.1 = alone", () => "Bearer ="],
    ["RFC 6750 §3.1 the token in quotes", (token) => `Bearer "${token}"`],
    ["RFC 6750 §3.1 two tokens", (token) => `Bearer ${token} ${token}`],
    ["RFC 6750 §3.1 two fields", (token) => `Bearer ${token}, Bearer ${token}`],
    ["RFC 6750 §3.1 Bearer, then DPoP", (token) => `Bearer ${token}, DPoP ${token}`],
    ["RFC 6750 §3.1 an unknown scheme, then Bearer", (token) => `Basic eA==, Bearer ${token}`],
    ["RFC 6750 §3.1 the same without a space", (token) => `Basic eA==,Bearer ${token}`],
    ["RFC 6750 §3.1 an unknown scheme, then DPoP alone", () => "Basic eA==, DPoP"],
  ],
  "400 invalid_request at dpop": [
    ["RFC 6750 §3.1 no token, scheme dpop", () => "dpop"],
    ["RFC 6750 §3.1 a character outside b64token, DPoP", (token) => `DPoP ${token}!`],
    ["RFC 6750 §3.1 DPoP, then Bearer", (token) => `DPoP ${token}, Bearer ${token}`],
  ],
};

for (const [expected, rows] of Object.entries(presented))
  for (const [rule, field] of rows)
    test(`GET /identity, ${rule} → ${expected}`, async () => {
      const answer = await call(field(await token()));
      if (expected !== "200") return expectRefusal(answer, expected);
      expectJson(answer);
      expect(answer.json).toContainEqual({ type: "client_id", value: "client" });
    });

test("GET /identity, RFC 6750 §2 a token in query, body or cookie is never looked at → 401", async () => {
  const valid = await token();
  expectRefusal(await send(`${identity}?access_token=${valid}`), "401");
  expectRefusal(await send(identity, { headers: { cookie: `access_token=${valid}` } }), "401");
  const body = `access_token=${valid}`;
  const head = `GET /identity HTTP/1.1\r\nHost: api\r\nConnection: close\r\nContent-Type: ${form}`;
  const answer = await raw(aud, `${head}\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
  expect(answer).toStartWith("HTTP/1.1 401 ");
  expect((await bearer(valid, `${identity}?access_token=none`)).status).toBe(200);
});

// --- Which token is valid ------------------------------------------------------------------------

const base64url = (text: string) => Buffer.from(text).toString("base64url");
const headerOf = (alg: string, kid = "key") => JSON.stringify({ alg, kid, typ: "at+jwt" });
const withPart = async (index: number, text: string) =>
  (await token()).split(".").with(index, base64url(text)).join(".");
const unsigned = async (jws: Promise<string>) => (await jws).replace(/[^.]+$/, "");

/** A token whose claims are this text, byte for byte. */
async function signedText(text: string): Promise<string> {
  const jws = new jose.CompactSign(new TextEncoder().encode(text));
  return await jws.setProtectedHeader(JSON.parse(headerOf("ES256"))).sign(signer.privateKey);
}

/** A token signed with a public key as if it were a secret. */
const symmetric = async (secret: string) =>
  signSymmetric(secret, jose.decodeJwt(await token()), { kid: "rsa", typ: "at+jwt" });

const { publicJwk: jwk } = stranger;
const foreign = { jwk, jku: `${iss}/elsewhere`, x5u: `${iss}/elsewhere` };
const rsaPem = await jose.exportSPKI((await jose.importJWK(rsa.publicJwk)) as jose.CryptoKey);

type Make = () => string | Promise<string>;
const valid: [rule: string, make: Make][] = [
  ["RFC 9068 §4 a valid token", () => token()],
  ["RFC 9068 §4 typ application/at+jwt", () => token({}, { typ: "application/at+jwt" })],
  ["RFC 7515 §4.1.9 typ in capitals", () => token({}, { typ: "Application/AT+JWT" })],
  ["RFC 9068 §2.1 alg RS256", () => token({}, {}, rsa)],
  ["RFC 9068 §4 alg ES384", () => token({}, {}, es384)],
  ["RFC 9068 §4 aud a list of this resource", () => token({ aud: [aud] })],
  ["RFC 9068 §4 aud a list with this resource", () => token({ aud: [other, aud] })],
  ["RFC 9068 §4 exp 29 s ago", () => token({ exp: now - 29 })],
  ["RFC 7519 §2 exp with a fraction", () => token({ exp: now + 60.5 })],
  ["RFC 7519 §4.1.5 nbf 30 s ahead", () => token({ nbf: now + 30 })],
  ["RFC 7515 §4.1.2, RFC 7515 §4.1.3, RFC 7515 §4.1.5 jku, jwk, x5u", () => token({}, foreign)],
  ["RFC 7515 §4 an unknown member in the header", () => token({}, { x: 1 })],
  ["RFC 7519 §4 an unknown claim", () => token({ "urn:x": { cnf: 1 } })],
  ["RFC 6749 §3.3 scope with others around it", () => token({ scope: "a api1 b" })],
  ["RFC 9068 §2.2.3 scope as a list of several", () => token({ scope: ["a", "api1"] })],
];

type Row = [rule: string, make: Make, said: RegExp];
/** A row for each value, with what the log names as wrong. */
const rowsSaying = (rule: string, said: RegExp, values: unknown[], make: (value: any) => Make) =>
  rowsOf(rule, values, make).map(([name, made]): Row => [name, made, said]);
/** The same for the claim that ends the rule, or the member of the header. */
const claim = (rule: string, said: RegExp, ...values: unknown[]) =>
  rowsSaying(rule, said, values, (value) => () => token({ [rule.split(" ").at(-1)!]: value }));
const member = (rule: string, said: RegExp, ...values: unknown[]) =>
  rowsSaying(rule, said, values, (value) => () => token({}, { [rule.split(" ").at(-1)!]: value }));
const algorithms = ["none", "NONE", "ES1024", "constructor", "RS256", "HS256"];
const withAlg = (alg: string) => () => withPart(0, headerOf(alg));
const junkTexts = ["claims", '{"iss":"x"', "null", '"claims"', "[]"];
const [noKey, forged] = [/key/, /signature/];

const invalid: Row[] = [
  ...member("RFC 9068 §4 typ", /typ/, "JWT", "dpop+jwt", "text/at+jwt", ["at+jwt"], undefined),
  ...member("RFC 7515 §4.1.4 kid", noKey, "", "unknown", "__proto__", 7),
  ["RFC 7515 §4.1.4 Choice: no kid", () => token({}, { kid: undefined }), /kid/],
  ...rowsSaying("RFC 9068 §4 the header changed to alg", /alg|key/, algorithms, withAlg),
  ["RFC 7518 §3.6 alg none, no signature", () => unsigned(withPart(0, headerOf("none"))), /alg/],
  ["RFC 8725 §2.1 HS256 with the public key as secret, PEM", () => symmetric(rsaPem), /alg/],
  ["RFC 8725 §2.1 the same, JWK", () => symmetric(JSON.stringify(rsa.publicJwk)), /alg/],
  ["RFC 7517 §4.4 alg other than the key's", () => token({}, { kid: "rs512" }, rsa), noKey],
  ["RFC 9068 §4 signed with another key", () => token({}, { kid: "key" }, stranger), forged],
  ["RFC 7515 §4.1.3 signed with the jwk", () => token({}, { kid: "key", jwk }, stranger), forged],
  ["RFC 9068 §4 no signature", () => unsigned(token()), forged],
  ["RFC 9068 §4 other claims", () => withPart(1, '{"sub":"root"}'), forged],
  ["RFC 7517 §4.2 a key for encryption", () => token({}, { kid: "enc" }, stranger), noKey],
  ...claim("RFC 9068 §4 iss", /"iss"/, undefined, other, `${iss}/`, iss.toUpperCase(), [iss], ""),
  ...claim("RFC 9068 §4 aud", /"aud"/, undefined, other, `${aud}/`, aud.slice(0, -1), "client"),
  ...claim("RFC 9068 §4 aud", /"aud"/, [other], [], { [aud]: aud }),
  ...claim("RFC 9068 §4 exp", /"exp"/, undefined, null, `${now + 60}`, now - 30),
  ...claim("RFC 9068 §2.2 iat", /"iat"/, undefined, null, `${now}`),
  ...claim("RFC 7519 §4.1.5 nbf", /"nbf"/, now + 31, "0", null),
  ...claim("RFC 9068 §2.2 sub", /sub/, undefined, "", 7, null, ["client"]),
  ...claim("RFC 9068 §2.2 client_id", /client_id/, undefined, "", 7, null, ["client"]),
  ...claim("RFC 9068 §2.2 jti", /jti/, undefined, "", 7, null, ["client"]),
  ["RFC 7515 §4.1.11 crit with exp", () => token({}, { crit: ["exp"], exp: 1 }), /exp/],
  ["RFC 7515 §4.1.11 crit with b64", () => token({}, { crit: ["b64"], b64: true }), /crit/],
  ...claim("RFC 7800 §3 cnf", /jkt/, null, {}, "x", { kid: "x" }, { jkt: "" }, { jkt: 7 }),
  ["RFC 7519 §7.2 no JWT", () => "token", /JW/],
  ["RFC 7519 §7.2 two parts", async () => (await token()).replace(/\.[^.]+$/, ""), /JW/],
  ["RFC 7519 §7.2 five parts, as of a JWE", async () => `${await token()}.AA.AA`, /JW/],
  ...rowsSaying("RFC 7519 §7.2 claims", /JW/, junkTexts, (text) => () => signedText(text)),
  ...rowsSaying("RFC 7519 §7.2 header", /JW/, junkTexts, (text) => () => withPart(0, text)),
];

const scopes = [
  ...[undefined, "", "api2", "api10", "my-api1", "API1", "api1,api2", "api1\tapi2", null, true],
  ...[[], ["api2"], ["api1 api2"], [["api1"]], { api1: "api1" }],
];

const tokens: Record<string, [rule: string, make: Make, said?: RegExp][]> = {
  "200": valid,
  "401 invalid_token at bearer": invalid,
  "403 insufficient_scope at bearer": claim("RFC 6750 §3.1 scope", /scope/, ...scopes),
};

for (const [expected, rows] of Object.entries(tokens))
  for (const [rule, make, said] of rows)
    test(`GET /identity, ${rule} → ${expected}`, async () => {
      const presented = await make();
      // Twice: the answer must be the same when the API remembers the token.
      for (let times = 0; times < 2; times++) {
        const answer = await bearer(presented);
        if (expected !== "200") expectRefusal(answer, expected, said);
        else expect(answer.json).toContainEqual({ type: "sub", value: "client" });
        if (!expected.startsWith("403")) continue;
        expect(challenges(answer)["bearer"]!["scope"]).toBe("api1");
        const { jti } = jose.decodeJwt(presented);
        expect(api.lines.at(-1)).toMatchObject({ client_id: "client", scope: "api1", jti });
      }
    });

test("GET /identity, RFC 7515 §4.1 nothing that a header names is fetched", async () => {
  expect((await bearer(token({}, foreign))).status).toBe(200);
  expect(issuer.requests).not.toContain("/elsewhere");
});

test("log: one short line for a call that is refused, none for one that is answered, no token", async () => {
  const before = api.lines.length;
  await bearer(token());
  const long = "x".repeat(9_000);
  for (const claims of [{}, { iss: long }, { scope: long }]) await bearer(token(claims));
  const lines = api.lines.slice(before);
  expect(lines.map(({ error }) => error)).toEqual(["invalid_token", "insufficient_scope"]);
  for (const { reason, milliseconds } of lines) {
    expect(reason.length).toBeLessThanOrEqual(2_000);
    expect(milliseconds).toBeInteger();
    expect(milliseconds).toBeWithin(0, 60_000);
  }
  const log = JSON.stringify(api.lines);
  const parts = made.flatMap((jwt) => [jwt, ...jwt.split(".")]);
  expect(parts.filter((part) => log.includes(part))).toEqual([]);
});

// --- What the API tells --------------------------------------------------------------------------

test("GET /identity → the claims as a list of types and values, each value a string", async () => {
  const plain = { iss, sub: "client", aud, client_id: "client", iat: now, exp: now + 60, jti: "x" };
  const text = 'a "quoted"\n\u00e4\u{1f511}';
  const roles = ["reader", "", 7, false, null, { of: "all" }, ["nested", ["twice"]]];
  const shown = ["reader", "", "7", "false", "null", '{"of":"all"}', '["nested",["twice"]]'];
  type Shown = [type: string, claim: unknown, ...values: string[]];
  const rows: Shown[] = [
    ...Object.entries(plain).map(([type, claim]): Shown => [type, claim, `${claim}`]),
    ["number", -1.5, "-1.5"],
    ["large", 9_007_199_254_740_991, "9007199254740991"],
    ["yes", true, "true"],
    ["nothing", null, "null"],
    ["empty", "", ""],
    ["text", text, text],
    ["address", { country: "NL", lines: ["a"] }, '{"country":"NL","lines":["a"]}'],
    ["__proto__", "own", "own"],
    ["scope", ["a", "api1"], "a", "api1"],
    ["roles", roles, ...shown],
    ["none", []],
  ];
  const presented = await token(Object.fromEntries(rows.map(([type, claim]) => [type, claim])));
  const expected = rows.flatMap(([type, , ...values]) => values.map((value) => ({ type, value })));
  const byType = (a: { type: string }, b: { type: string }) => (a.type < b.type ? -1 : 1);
  // Whether the token is validated or remembered.
  for (let times = 0; times < 3; times++) {
    const answer = await bearer(presented);
    expectJson(answer);
    expect(answer.json.toSorted(byType)).toEqual(expected.toSorted(byType));
  }
});

test("GET /identity → each caller sees the claims of the token that came, once and again", async () => {
  const subjects = ["one", "two", "three", "one", "two", "three"];
  const tokens = await Promise.all(subjects.map((sub) => token({ sub })));
  for (let times = 0; times < 2; times++) {
    const answers = await Promise.all(tokens.map((presented) => bearer(presented)));
    const seen = answers.map(({ json }) => json.find(({ type }: any) => type === "sub").value);
    expect(seen).toEqual(subjects);
  }
});

test("GET metadata, RFC 9728 §2 → 200, and they are where the challenge says", async () => {
  const answer = await send(challenges(await call())["bearer"]!["resource_metadata"]!);
  expectJson(answer);
  expect(answer.json).toEqual({
    resource: aud,
    resource_name: "My API",
    authorization_servers: [iss],
    scopes_supported: ["api1"],
    bearer_methods_supported: ["header"],
    dpop_signing_alg_values_supported: algs.split(" "),
  });
});

test("GET metadata, RFC 9728 §2 other settings → what is told, and what counts", async () => {
  const settings = { resource_name: "Orders", scope: "orders", acceptedAlgorithms: ["RS256"] };
  const { url } = await startApi(iss, { ...settings, clock });
  const { json } = await send(`${url}/.well-known/oauth-protected-resource`);
  const told = { resource: url, resource_name: "Orders", scopes_supported: ["orders"] };
  expect(json).toMatchObject({ ...told, dpop_signing_alg_values_supported: ["RS256"] });
  const asked = async (claims: Members, by?: Key) => {
    const answer = await bearer(token({ aud: url, ...claims }, {}, by), `${url}/identity`);
    const { error, scope } = challenges(answer)["bearer"] ?? {};
    return [answer.status, error, scope, challenges(answer)["dpop"]?.["algs"]];
  };
  expect(await asked({})).toEqual([401, "invalid_token", undefined, "RS256"]);
  expect(await asked({}, rsa)).toEqual([403, "insufficient_scope", "orders", "RS256"]);
  expect(await asked({ scope: "orders" }, rsa)).toEqual([200, undefined, undefined, undefined]);
  const unset = await startApi(iss, { scope: undefined!, clock });
  const unlimited = token({ aud: unset.url, scope: undefined });
  expect((await bearer(unlimited, `${unset.url}/identity`)).status).toBe(403);
});

test("an API with a path, RFC 9728 §3.1 → routes, metadata, aud and htu have it", async () => {
  const { url } = await startApi(iss, { resource: "http://127.0.0.1:0/base/v1", clock });
  const { origin } = new URL(url);
  expect(url).toBe(`${origin}/base/v1`);
  const wellKnown = `${origin}/.well-known/oauth-protected-resource/base/v1`;
  expect((await send(wellKnown)).json).toMatchObject({ resource: url });
  const anonymous = await send(`${url}/identity`);
  expect(challenges(anonymous)["bearer"]).toEqual({ resource_metadata: wellKnown });
  expect((await bearer(token({ aud: url }), `${url}/identity`)).status).toBe(200);
  expect((await bearer(token({ aud: origin }), `${url}/identity`)).status).toBe(401);
  const jkt = await jose.calculateJwkThumbprint(stranger.publicJwk);
  const bound = await token({ aud: url, cnf: { jkt } });
  for (const [place, status] of [[url, 200] as const, [origin, 401] as const]) {
    const dpop = await proof(stranger, "GET", `${place}/identity`, bound, { iat: now });
    const headers = { authorization: `DPoP ${bound}`, dpop };
    expect((await send(`${url}/identity`, { headers })).status).toBe(status);
  }
  const paths = ["/identity", "/health", "/.well-known/oauth-protected-resource", "/base/v1"];
  for (const path of paths) expect((await send(origin + path)).status).toBe(404);
  expect((await send(`${url}/health`)).status).toBe(200);
});

// --- Routes --------------------------------------------------------------------------------------

const around = ["allow", "cache-control", "www-authenticate"];

for (const path of ["/identity", "/.well-known/oauth-protected-resource", "/health"])
  test(`${path}, RFC 9110 §9.3.2, RFC 9110 §15.5.6 HEAD → as GET, other methods → 405`, async () => {
    const headers = { authorization: `Bearer ${await token()}` };
    const head = await send(aud + path, { method: "HEAD", headers });
    const get = await send(aud + path, { headers });
    expectJson(head);
    expect([head.text, head.headers.get("content-length")]).toEqual(["", `${get.text.length}`]);
    for (const method of ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"]) {
      const answer = await send(aud + path, { method });
      expect(fields(answer, ...around)).toEqual([405, "GET, HEAD", "no-store", null]);
    }
  });

test("elsewhere, RFC 9110 §15.5.5 → 404", async () => {
  const paths = ["/", "/identity/", "/Identity", "/%69dentity"];
  paths.push("/.well-known/openid-configuration", "/.well-known/oauth-protected-resource/identity");
  for (const path of paths)
    for (const method of ["GET", "POST"]) {
      const answer = await send(aud + path, { method });
      expect(fields(answer, ...around)).toEqual([404, null, "no-store", null]);
      expect(answer.text).toMatch(/^[ -~]{4,}$/);
    }
});

// --- The API as somebody copies it ---------------------------------------------------------------

/** An issuer, an API that trusts it, and a clock that a test can move. */
async function trial(changes: Partial<Settings> = {}, begin = startApi) {
  const issuer = new Issuer([signer]);
  const time = { ms: clock() };
  const { url, lines } = await begin(issuer.url, { clock: () => time.ms, ...changes });
  const made = (claims: Members = {}, header: Members = {}, by = signer) =>
    accessToken(by, issuer.url, url, { exp: now + 10 * 86_400, ...claims }, header);
  const ask = async (by?: Key, header?: Members) =>
    await bearer(made({}, header, by), `${url}/identity`);
  const unknown = async () => await ask(signer, { kid: "unknown" });
  const statuses = async (...calls: (() => Promise<Answer>)[]) => {
    const seen: number[] = [];
    for (const next of calls) seen.push((await next()).status);
    return seen;
  };
  /** How often the issuer was asked for its keys. */
  const fetches = () =>
    issuer.requests.filter((path) => path.endsWith("/openid-configuration")).length;
  return { issuer, time, url, lines, made, ask, unknown, statuses, fetches };
}

describe("a copy of api.ts with routes of its own", async () => {
  const directory = temporaryDirectory();
  symlinkSync(join(root, "node_modules"), join(directory, "node_modules"));
  cpSync(join(root, "config.ts"), join(directory, "config.ts"));
  const source = readFileSync(join(root, "api.ts"), "utf8");
  const added = `
    "GET /again": async (request) => {
      const claims = await api.authorize(request, api.settings.scope);
      const again = (globalThis.seen ??= new WeakSet()).has(claims);
      globalThis.seen.add(claims);
      try { claims.sub = "root"; } catch {}
      try { claims.roles.push("root"); } catch {}
      return Response.json({ ...claims, again });
    },
    "POST /orders": async (request) => {
      await api.authorize(request, api.settings.scope);
      return Response.json(await jsonBody(request));
    },
    "DELETE /orders": () => new Response(null, { status: 204 }),
    "GET /health":`;
  const file = join(directory, "api.ts");
  writeFileSync(file, source.replace('"GET /health":', added));
  const { start }: typeof import("../../api.ts") = await import(file);

  const { issuer, time, url, lines, made, unknown } = await trial(
    { coolDownSeconds: 0 },
    async (issuer, changes) => {
      const lines: (typeof api)["lines"] = [];
      const log = { write: (line: string) => lines.push(JSON.parse(line)), flush: () => 0 };
      const own = { resource: "http://127.0.0.1:0", issuer, log };
      return { ...(await start({ ...resourceServer, ...own, ...changes })), lines };
    },
  );
  /** For each of these tokens, whether it is one that the API remembers. */
  const again = async (...presented: string[]) => {
    const seen: boolean[] = [];
    for (const each of presented) seen.push((await bearer(each, `${url}/again`)).json.again);
    return seen;
  };
  await again(await made()); // now the keys are there

  test("a token is remembered until it expires, from then on validated with leeway", async () => {
    const presented = await made({ exp: now + 100 });
    expect(await again(presented, presented)).toEqual([false, true]);
    time.ms = (now + 100) * 1000 - 1;
    expect(await again(presented)).toEqual([true]);
    time.ms += 1;
    expect(await again(presented, presented)).toEqual([false, false]);
    time.ms = (now + 130) * 1000 - 1;
    expect(await again(presented)).toEqual([false]);
    time.ms += 1;
    expect((await bearer(presented, `${url}/again`)).status).toBe(401);
    time.ms = clock();
  });

  test("an Authorization field of up to 4,096 characters is remembered", async () => {
    const presented = await made({ padding: "x".repeat(2_500) });
    const ofLength = async (length: number) => {
      const field = `Bearer${" ".repeat(length - 6 - presented.length)}${presented}`;
      return (await call(field, `${url}/again`)).json.again;
    };
    // The claims are remembered with the field they came in.
    expect([await ofLength(4_096), await ofLength(4_096)]).toEqual([false, true]);
    expect([await ofLength(4_097), await ofLength(4_097)]).toEqual([false, false]);
  });

  test("1,000 tokens are remembered, and the oldest is forgotten first", async () => {
    const tokens = await Promise.all(Array.from({ length: 1_001 }, () => made()));
    const [first = "", second = "", last = "", ...rest] = tokens;
    await again(first, second);
    await Promise.all(rest.map((presented) => again(presented)));
    expect(await again(first, second, last)).toEqual([true, true, false]);
    expect(await again(first, last)).toEqual([false, true]);
  });

  test("all tokens are forgotten when the keys change, none when they stay", async () => {
    const presented = await made();
    expect(await again(presented, presented)).toEqual([false, true]);
    const { length } = issuer.requests;
    await unknown();
    expect(issuer.requests).toHaveLength(length + 2);
    expect(await again(presented)).toEqual([true]);
    issuer.publish(signer.publicJwk, stranger.publicJwk);
    await unknown();
    expect(await again(presented, presented)).toEqual([false, true]);
    issuer.publish(stranger.publicJwk);
    await unknown();
    expect((await bearer(presented, `${url}/again`)).status).toBe(401);
    issuer.publish(signer.publicJwk);
  });

  test("what a handler writes to the claims does not reach the next call", async () => {
    const presented = await made({ roles: ["reader"] });
    for (let times = 0; times < 2; times++) {
      const { json } = await bearer(presented, `${url}/again`);
      expect(json).toMatchObject({ sub: "client", roles: ["reader"] });
    }
  });

  test("POST /orders, RFC 8259 §2, RFC 9110 §15.5.14 a malformed body → 400, over 1 MiB → 413", async () => {
    const valid = `Bearer ${await made()}`;
    const post = async (body: string, authorization = valid) =>
      await send(`${url}/orders`, { method: "POST", headers: { authorization }, body });
    expect((await post('{"of":1}')).json).toEqual({ of: 1 });
    for (const body of ["hunter2", '{"of":', ""]) {
      const answer = await post(body);
      expect(callRefusalOf(answer)).toBe("400 invalid_request at bearer");
      expect(answer.text).toMatch(/^[ -~]{10,}$/);
      expect(lines.at(-1)).toMatchObject({ event: "call refused", error: "invalid_request" });
      expect(lines.at(-1)!["reason"]).not.toContain("hunter2");
    }
    expect((await post("x".repeat(1_048_576), "")).status).toBe(401);
    expect((await post("x".repeat(1_048_577), "")).status).toBe(413);
    // RFC 9110 §15.5.6: a 405 names what there is.
    const orders = async (method: string) => await send(`${url}/orders`, { method });
    for (const method of ["GET", "HEAD", "PUT"])
      expect(fields(await orders(method), "allow")).toEqual([405, "POST, DELETE"]);
    expect((await orders("DELETE")).status).toBe(204);
  });
});

// --- A fetch of the issuer's keys ----------------------------------------------------------------

const good = signer.publicJwk;
const junk = (changes: object) => ({ ...stranger.publicJwk, kid: "junk", ...changes });
const junkOfKinds: unknown[] = [
  ...[null, "key", 7, [good], {}, junk({ kty: undefined }), junk({ kty: "ECX" })],
  ...[junk({ kty: "XEC" }), { kty: "oct", kid: "key", k: "AAAA" }, junk({ crv: ["P-256"] })],
  ...[junk({ kty: "RSA", n: "x".repeat(701), e: "AQAB" })],
];
const documents = ["/openid-configuration", "/jwks"];

/** What an issuer does in another way than a valid one. */
type Deviation = (issuer: Issuer) => void;
const metadata = (changes: object) => (issuer: Issuer) =>
  void Object.assign(issuer.metadata as object, changes);
const keys =
  (...jwks: unknown[]) =>
  (issuer: Issuer) =>
    issuer.publish(...jwks);
/** It answers something else in place of one of its two documents. */
const instead = (path: string, answer: (document: unknown) => Response) => (issuer: Issuer) => {
  const document = path === "/jwks" ? issuer.jwks : issuer.metadata;
  issuer.answer = ({ url }) => (url.endsWith(path) ? answer(document) : undefined);
};
const ofBytes = (bytes: number) => (document: unknown) => padded(document, bytes);
const inGzip = (document: unknown) => zipped(JSON.stringify(document));
function endless(): Response {
  const chunk = new Uint8Array(65_536).fill(0x20);
  return new Response(new ReadableStream({ pull: (controller) => controller.enqueue(chunk) }));
}

const jwks_uri = `${new Issuer([signer]).url}/tenant/jwks?version=2`;
const taken: [rule: string, deviate: Deviation][] = [
  ["RFC 8414 §3.2 valid metadata and a valid JWK Set", () => {}],
  ["RFC 8414 §3.2 unknown metadata", metadata({ x: { jwks_uri: "x" } })],
  ["RFC 8414 §2 a jwks_uri elsewhere, with a query", metadata({ jwks_uri })],
  ["RFC 7517 §5 an unknown member", (issuer) => Object.assign(issuer.jwks as object, { x: 1 })],
  ...rowsOf("RFC 8414 §3.2 of 1 MiB", documents, (path) => instead(path, ofBytes(1_048_576))),
  ...rowsOf("RFC 7517 §5 the key among", junkOfKinds, (odd) => keys(odd, good, odd)),
  ["RFC 7517 §5 a broken key too", keys({ kty: "EC", kid: "x" }, good)],
  ["RFC 7517 §4.5 an RSA key of the same kid", keys({ ...rsa.publicJwk, kid: "key" }, good)],
  ["RFC 7517 §4.2 the same kid with use enc", keys(junk({ use: "enc", kid: "key" }), good)],
  ["RFC 7517 §4.2 a key with use", keys({ ...good, use: "sig" })],
  ["RFC 7517 §4.4 no alg", keys({ ...good, alg: undefined })],
];

const location = "/elsewhere";
const withStatus = (status: number) => (document: unknown) =>
  Response.json(document, { status, headers: { location } });
const statuses = [201, 203, 301, 302, 303, 307, 308, 404, 500, 503];
const texts = ["", "{", "null", "[]", '"text"', "7", "{}", '{"keys":null}', '{"keys":{}}'];
const data = `data:application/json,${JSON.stringify({ keys: [good] })}`;
const uris = [undefined, "", 7, "/jwks", "https://", data];
/** 0.0.0.0 reaches this machine, but is no loopback address. */
const away = ({ url }: Issuer) => `${url.replace("127.0.0.1", "0.0.0.0")}/jwks`;

const notTaken: [rule: string, deviate: Deviation][] = [
  ...documents.flatMap((path) => [
    ...rowsOf(`RFC 8414 §3.2 ${path}, status`, statuses, (n) => instead(path, withStatus(n))),
    ...rowsOf(`RFC 8259 §2 ${path} is`, texts, (text) => instead(path, () => new Response(text))),
  ]),
  ...rowsOf("RFC 8414 §3.2 over 1 MiB", documents, (path) => instead(path, ofBytes(1_048_577))),
  ...rowsOf("RFC 8414 §3.2 without end", documents, (path) => instead(path, endless)),
  ...rowsOf("RFC 8414 §3.2 in gzip", documents, (path) => instead(path, inGzip)),
  ["RFC 8414 §3.3 another issuer", metadata({ issuer: other })],
  ["RFC 8414 §3.3 no issuer", metadata({ issuer: undefined })],
  ["RFC 8414 §3.3 issuer with a slash", (own) => metadata({ issuer: `${own.url}/` })(own)],
  ["RFC 8414 §3.3 issuer in a list", (own) => metadata({ issuer: [own.url] })(own)],
  ...rowsOf("RFC 8414 §2 jwks_uri", uris, (uri) => metadata({ jwks_uri: uri })),
  ["RFC 8414 §2 http beyond loopback", (own) => metadata({ jwks_uri: away(own) })(own)],
  ...rowsOf("RFC 7517 §5 alone", junkOfKinds, (odd) => keys(odd)),
  ["RFC 7517 §5 Choice: over 100 keys", keys(...Array.from({ length: 101 }, () => good))],
];

for (const [status, rows] of Object.entries({ 200: taken, 503: notTaken }))
  for (const [rule, deviate] of rows)
    test(`a fetch of the keys, ${rule} → ${status}`, async () => {
      const { issuer, ask, lines } = await trial();
      deviate(issuer);
      const answer = await ask();
      expect(issuer.requests).not.toContain(location);
      if (status === "200") return expectJson(answer);
      expectUnavailable(answer);
      const { event, error, reason } = lines.at(-1)!;
      expect([event, error]).toEqual(["call refused", "temporarily_unavailable"]);
      expect(reason).toMatch(sentence);
      expect(reason).not.toMatch(/ is not a function|undefined is /);
    });

test("a fetch of the keys, RFC 7517 §5 a token of a broken key → 401, of a sound one → 200", async () => {
  const { issuer, ask, statuses } = await trial();
  issuer.publish({ kty: "EC", kid: "broken", alg: "ES256" }, good);
  expect(await statuses(() => ask(signer, { kid: "broken" }), ask)).toEqual([401, 200]);
});

// --- Their life ----------------------------------------------------------------------------------

describe("the keys of the issuer", () => {
  const down = () => new Response("", { status: 500 });

  test("RFC 9110 §10.2.3 no keys → 503, and one fetch in a cool-down", async () => {
    const { issuer, time, ask, unknown, fetches } = await trial({ coolDownSeconds: 6.5 });
    issuer.answer = down;
    expect(fetches()).toBe(0);
    for (const next of [ask, unknown, ask]) expectUnavailable(await next(), "7");
    expect(fetches()).toBe(1);
    issuer.answer = undefined;
    time.ms += 6_499;
    expectUnavailable(await ask(), "7");
    time.ms += 1;
    expect([(await ask()).status, fetches()]).toEqual([200, 2]);
  });

  test("calls at once share one fetch; an unknown kid within its cool-down → 401, no fetch", async () => {
    const { ask, unknown, statuses, fetches } = await trial();
    const calls = Array.from({ length: 20 }, (_, n) => (n % 2 ? unknown : ask));
    const seen = await Promise.all(calls.map((next) => statuses(next)));
    expect(seen).toEqual(calls.map((next) => [next === ask ? 200 : 401]));
    expect([...(await statuses(unknown, unknown)), fetches()]).toEqual([401, 401, 1]);
  });

  test("an unknown kid fetches within the same call, and the new key counts", async () => {
    const { issuer, ask, unknown, statuses, fetches } = await trial({ coolDownSeconds: 0 });
    const fresh = () => ask(stranger);
    expect(await statuses(ask, fresh)).toEqual([200, 401]);
    expect(fetches()).toBe(2);
    issuer.publish(signer.publicJwk, stranger.publicJwk);
    expect(await statuses(fresh, fresh, ask)).toEqual([200, 200, 200]);
    expect(fetches()).toBe(3);
    // Another key under the same kid: tokens of the old one are refused.
    const renewed = () => ask(stranger, { kid: "key" });
    issuer.publish({ ...stranger.publicJwk, kid: "key" });
    expect(await statuses(unknown, ask, renewed)).toEqual([401, 401, 200]);
  });

  test("an unknown kid, the issuer down → 503, once more within the cool-down", async () => {
    const played = await trial({ coolDownSeconds: 0.02 });
    const { issuer, time, ask, unknown, statuses, fetches } = played;
    expect(await statuses(ask)).toEqual([200]);
    issuer.answer = down;
    time.ms += 20;
    expect(await statuses(unknown)).toEqual([503]);
    const failed = fetches();
    // A key that is known goes on to count.
    expect(await statuses(unknown, ask, unknown)).toEqual([503, 200, 503]);
    expect(fetches()).toBe(failed);
    issuer.answer = undefined;
    time.ms += 20;
    expect(await statuses(unknown)).toEqual([401]);
  });

  test("RFC 7517 §5 a junk set changes nothing, an empty one withdraws all keys", async () => {
    const { issuer, ask, unknown, statuses } = await trial({ coolDownSeconds: 0 });
    issuer.publish();
    expect(await statuses(ask)).toEqual([401]);
    issuer.publish(signer.publicJwk);
    expect(await statuses(ask)).toEqual([200]);
    issuer.publish({ kty: "oct", k: "AAAA" });
    expect(await statuses(unknown, ask)).toEqual([503, 200]);
    issuer.publish();
    expect(await statuses(unknown, ask)).toEqual([401, 401]);
  });

  test("keys are refreshed in the background, and a failure changes nothing", async () => {
    const settings = { refreshSeconds: 0.02, coolDownSeconds: 0 };
    const { issuer, url, lines, made, ask, statuses, fetches } = await trial(settings);
    const presented = await made();
    const remembered = () => bearer(presented, `${url}/identity`);
    // Not before somebody needed them.
    await Bun.sleep(50);
    expect(fetches()).toBe(0);
    expect(await statuses(remembered)).toEqual([200]);
    await eventually("three fetches", () => fetches() > 2);
    issuer.answer = down;
    await eventually("a failure is logged", () => lines.length > 1);
    issuer.publish({ kty: "oct", k: "AAAA" });
    issuer.answer = undefined;
    await eventually("the junk set is logged", () =>
      lines.some(({ reason }) => /usable/.test(reason)),
    );
    const line = { event: "keys not fetched", reason: expect.stringMatching(sentence) };
    for (const each of lines) expect(each).toMatchObject(line);
    expect(await statuses(remembered, ask)).toEqual([200, 200]);
    issuer.publish(stranger.publicJwk);
    await eventually("the old key is gone", async () => (await remembered()).status === 401);
    expect((await ask(stranger)).status).toBe(200);
  });

  test("the last known keys count for a day after they were fetched, then 503", async () => {
    const { issuer, url, time, made, ask, statuses, fetches } = await trial();
    const presented = await made();
    const remembered = () => bearer(presented, `${url}/identity`);
    const health = () => send(`${url}/health`);
    expect(await statuses(remembered, health)).toEqual([200, 200]);
    issuer.answer = down;
    time.ms += 86_400_000;
    expect(await statuses(remembered, ask, health)).toEqual([200, 200, 200]);
    expect(fetches()).toBe(1);
    time.ms += 1;
    expectUnavailable(await remembered());
    expect(await statuses(ask, health)).toEqual([503, 503]);
    issuer.answer = undefined;
    time.ms += 5_000;
    expect(await statuses(remembered, ask, health)).toEqual([200, 200, 200]);
    // A clock that is set back makes no keys young.
    issuer.publish(stranger.publicJwk);
    time.ms -= 86_400_001;
    expect(await statuses(remembered)).toEqual([401]);
  });

  test("GET /health without keys → 503, and they are fetched; with keys → 200, and none are", async () => {
    const { issuer, url, fetches } = await trial({ coolDownSeconds: 0 });
    issuer.answer = down;
    const before = await send(`${url}/health`);
    expect([before.status, before.json]).toEqual([503, { status: "unavailable" }]);
    expect(before.headers.get("cache-control")).toBe("no-store");
    issuer.answer = undefined;
    const isReady = async () => (await send(`${url}/health`)).status === 200;
    await eventually("the keys are there", isReady);
    const fetched = fetches();
    const answer = await send(`${url}/health`);
    expectJson(answer);
    expect([answer.json, fetches()]).toEqual([{ status: "ok" }, fetched]);
  });
});
