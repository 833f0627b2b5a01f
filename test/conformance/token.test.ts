/**
 * POST /connect/token with a client that has authenticated: how the request is read, what is
 * granted, what the token says, and what is refused. A row is one deviation from a valid request.
 */

import { expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { type Answer, fieldsOf, form, post, raw, refusalOf, send } from "../support/http.ts";
import { idp as startIdp, resource as myApi } from "../support/servers.ts";

const now = 1_800_000_000;
const clock = () => now * 1000 + 999;

const orders = "https://orders.example.com/v1";
const audit = "urn:example:audit";
const scopes = [
  { scope: "api1", description: "My API", resource: myApi },
  { scope: "read", description: "Reading orders", resource: orders },
  { scope: "write", description: "Writing orders", resource: orders },
  { scope: "audit", description: "Auditing", resource: audit },
];

const [client] = authorizationServer.clients;
const registration = { ...client!, scope: "api1" };
const ownClaims = { tenant: "blue", roles: ["a", "b"], limits: { daily: 10 }, nothing: null };
const clients = [
  registration,
  { ...registration, client_id: "several", scope: "read api1 write" },
  { ...registration, client_id: "orders", scope: "write read" },
  { ...registration, client_id: "auditor", scope: "audit" },
  { ...registration, client_id: "short", access_token_lifetime_seconds: 1 },
  { ...registration, client_id: "claims", claims: ownClaims },
  { ...registration, client_id: "two grants", grant_types: ["password", "client_credentials"] },
  { ...registration, client_id: "other grant", grant_types: ["password"] },
  { ...registration, client_id: "nothing", grant_types: [] },
];

const idp = await startIdp({ scopes, clients, clock });
const { keys } = (await send(`${idp.url}/.well-known/openid-configuration/jwks`)).json;
const published = jose.createLocalJWKSet({ keys });

/** Parameters to change or to leave out, what comes after the body, or a whole body. */
type Change = Record<string, string | undefined> | `&${string}` | Uint8Array<ArrayBuffer>;

const valid = "grant_type=client_credentials&client_id=client&client_secret=secret";

function bodyOf(change: Change): string | Uint8Array<ArrayBuffer> {
  if (change instanceof Uint8Array) return change;
  if (typeof change === "string") return valid + change;
  const parameters = new URLSearchParams(valid);
  for (const [name, value] of Object.entries(change))
    if (value === undefined) parameters.delete(name);
    else parameters.set(name, value);
  return parameters.toString();
}

const ask = (change: Change, headers: Record<string, string> = {}) =>
  post(idp.tokenEndpoint, bodyOf(change), headers);

/** A body with these bytes as its scope. */
const bytes = (...codes: number[]) =>
  new Uint8Array([...new TextEncoder().encode(`${valid}&scope=`), ...codes]);

/** As another client, for a scope. */
const as = (client_id: string, scope?: string) => ({ client_id, scope });

/** RFC 6749 §5.1: nothing on the way may keep it. */
const noStore = { "cache-control": "no-store", pragma: "no-cache" };

/** What is granted, where it is not what `client` gets. */
type Grant = { aud?: string; scope?: string; expires_in?: number };

async function expectGrant(
  answer: Answer,
  { aud = myApi, scope = "api1", expires_in = 3600 }: Grant = {},
  client_id = "client",
  own = {},
): Promise<void> {
  expect(answer.status).toBe(200);
  const { "content-length": _length, "content-type": type, ...fields } = fieldsOf(answer);
  expect([type, fields]).toEqual([expect.stringMatching(/^application\/json(;|$)/), noStore]);
  const { access_token, ...described } = answer.json;
  expect(described).toEqual({ token_type: "Bearer", expires_in, scope });
  const options = { currentDate: new Date(now * 1000) };
  const { payload, protectedHeader } = await jose.jwtVerify(access_token, published, options);
  expect(protectedHeader).toEqual({ alg: "ES256", typ: "at+jwt", kid: keys[0].kid });
  const { jti, ...claims } = payload;
  const times = { iat: now, nbf: now, exp: now + expires_in };
  const who = { iss: idp.url, sub: client_id, client_id };
  expect(claims).toEqual({ ...who, aud, scope, ...times, ...own });
  expect(jti).toMatch(/^[0-9a-f-]{36}$/);
  expect(idp.lines.at(-1)).toMatchObject({ event: "token issued", client_id, scope, jti });
}

// --- Granted -------------------------------------------------------------------------------------

const readWrite = { aud: orders, scope: "read write" };
const writeRead = { aud: orders, scope: "write read" };

const granted: [rule: string, change: Change, grant?: Grant][] = [
  ["RFC 6749 §4.4.2 a valid request", {}],
  ["RFC 6749 §3.2 an unknown parameter", { audience: "x" }],
  ["RFC 6749 §3.2 an unknown parameter twice", "&x=1&x=2"],
  ["RFC 6749 §3.2 parameters named like members of every object", "&__proto__=1&constructor=2"],
  ["RFC 6749 Appendix B empty pairs", "&&=&"],
  ["RFC 6749 Appendix B a value with =", "&x=a=b"],
  ["RFC 6749 Appendix B a letter that is not ASCII, as it is", "&x=ä"],
  ["RFC 6749 Appendix B a percent-encoded name and value", "&%73cope=%61pi1"],
  ["RFC 6749 §3.2 an empty scope counts as absent", { scope: "" }],
  ["RFC 6749 §3.2 scope without = counts as absent", "&scope"],
  ["RFC 6749 §3.2 an empty resource counts as absent", { resource: "" }],
  ["RFC 6749 §3.2 an empty assertion", "&client_assertion=&client_assertion_type="],
  ["RFC 6749 §5.2 one of two registered grant types", as("two grants")],
  ["RFC 6749 §3.3 a scope twice is one", { scope: "api1 api1" }],
  ["RFC 6749 §3.3 no scope is all", as("orders"), writeRead],
  ["RFC 6749 §3.3 one of two", as("orders", "read"), { ...writeRead, scope: "read" }],
  ["RFC 6749 §3.3 two scopes, a space as %20", "&scope=api1%20api1"],
  ["RFC 6749 §3.3 three words, two scopes", as("several", "write read write"), writeRead],
  ["RFC 6749 §3.3 the scope decides the resource", as("several", "api1")],
  ["RFC 8707 §2 the only resource", { resource: myApi }],
  ["RFC 8707 §2 a URN", { ...as("auditor"), resource: audit }, { aud: audit, scope: "audit" }],
  ["RFC 8707 §2 resource alone: all there", { ...as("several"), resource: orders }, readWrite],
  ["RFC 8707 §2.2 scopes of it", { ...as("several", "write read"), resource: orders }, writeRead],
  ["RFC 8707 §2.2 an empty scope", { ...as("several", ""), resource: orders }, readWrite],
  ["RFC 6749 §5.1 a lifetime of its own", as("short"), { expires_in: 1 }],
];

for (const [rule, change, grant] of granted)
  test(`POST /connect/token, ${rule} → 200`, async () => {
    const { client_id } = change as { client_id?: string };
    await expectGrant(await ask(change), grant, client_id);
  });

for (const type of [`${form};charset=UTF-8`, `${form.toUpperCase()} ; charset=utf-8`])
  test(`POST /connect/token, RFC 9110 §8.3.1 Content-Type ${type} → 200`, async () =>
    await expectGrant(await ask({}, { "content-type": type })));

for (const query of ["scope=x", "grant_type=x", `resource=${audit}`, "client_secret=x", "%"])
  test(`POST /connect/token, RFC 6749 §4.4.2 the query is not read, ${query} → 200`, async () =>
    await expectGrant(await post(`${idp.tokenEndpoint}?${query}`, valid)));

test("POST /connect/token, RFC 9068 §2.2.2 claims of a registration → in the token", async () =>
  await expectGrant(await ask(as("claims")), {}, "claims", ownClaims));

test("POST /connect/token, RFC 9068 §2.2 → each token has a jti of its own", async () => {
  const answers = await Promise.all([ask({}), ask({}), ask({})]);
  const jtis = answers.map(({ json }) => jose.decodeJwt(json.access_token).jti);
  expect(new Set(jtis).size).toBe(3);
});

// --- Refused -------------------------------------------------------------------------------------

const toOther = { scope: "x", resource: "x" };
const wrong = { client_secret: "wrong" };

// No RFC says in which order the checks are made. Here nobody learns more than he has proved.
const refused: Record<string, [rule: string, change: Change, headers?: { dpop: string }][]> = {
  "400 invalid_request": [
    ["RFC 6749 §3.2 grant_type twice", "&grant_type=client_credentials"],
    ["RFC 6749 §3.2 client_id twice", "&client_id=client"],
    ["RFC 6749 §3.2 client_secret twice", "&client_secret=secret"],
    ["RFC 6749 §3.2 scope twice", "&scope=api1&scope=api1"],
    ["RFC 6749 §3.2 scope twice, the first one empty", "&scope=&scope=api1"],
    ["RFC 6749 §3.2 scope twice, the second one empty", "&scope=api1&scope"],
    ["RFC 6749 §3.2 scope twice, once percent-encoded", "&scope=api1&%73cope=api1"],
    ["RFC 6749 §3.2 client_assertion twice, both empty", "&client_assertion=&client_assertion="],
    ["RFC 6749 §3.2 client_assertion_type twice", "&client_assertion_type&client_assertion_type"],
    ["RFC 6749 Appendix B % alone", "&scope=%"],
    ["RFC 6749 Appendix B % before what is not hexadecimal", "&scope=api1%zz"],
    ["RFC 6749 Appendix B % in a name", "&%zz=1"],
    ["RFC 6749 Appendix B % in an unknown parameter", "&x=%"],
    ["RFC 6749 Appendix B percent-encoded bytes that are not UTF-8", "&scope=%C3%28"],
    ["RFC 6749 Appendix B a byte that is not UTF-8", bytes(0xff)],
    ["RFC 6749 Appendix B a percent-encoded NUL", "&scope=api1%00"],
    ["RFC 6749 Appendix B a NUL as it is", bytes(0)],
    ["RFC 6749 Appendix B a NUL in the secret", { client_secret: "secret\0" }],
    ["RFC 6749 Appendix B a NUL in a name", "&x%00=1"],
    ["RFC 6749 §4.4.2 no grant_type", { grant_type: undefined }],
    ["RFC 6749 §3.2 an empty grant_type", { grant_type: "" }],
    ["RFC 6749 §5.2 Choice: the parameters come before the client", { ...wrong, scope: "\0" }],
  ],
  "401 invalid_client": [
    ["RFC 6749 §5.2 Choice: the client comes before grant_type", { ...wrong, grant_type: "x" }],
    ["RFC 6749 §5.2 Choice: the client comes before its grants", { ...wrong, ...as("nothing") }],
    ["RFC 6749 §5.2 Choice: the client comes before scope and resource", { ...wrong, ...toOther }],
  ],
  "400 unsupported_grant_type": [
    ["RFC 6749 §5.2 grant_type authorization_code", { grant_type: "authorization_code" }],
    ["RFC 6749 §5.2 unknown grant_type", { grant_type: "x" }],
    ["RFC 6749 §5.2 grant_type in capitals", { grant_type: "CLIENT_CREDENTIALS" }],
    ["RFC 6749 §5.2 grant_type __proto__", { grant_type: "__proto__" }],
    ["RFC 6749 §5.2 another that is registered", { ...as("other grant"), grant_type: "password" }],
    ["RFC 6749 §5.2 Choice: grant_type comes before the proof", { grant_type: "x" }, { dpop: "x" }],
    ["RFC 6749 §5.2 Choice: grant_type comes before the resource", { grant_type: "x", ...toOther }],
  ],
  "400 unauthorized_client": [
    ["RFC 6749 §5.2 a client of another grant type", as("other grant")],
    ["RFC 6749 §5.2 a client without grant types", as("nothing")],
    ["RFC 6749 §5.2 Choice: grants come before the proof", as("nothing"), { dpop: "x" }],
    ["RFC 6749 §5.2 Choice: grants come before the scope", { ...toOther, ...as("nothing", "x") }],
  ],
  "400 invalid_dpop_proof": [
    ["RFC 9449 §5 Choice: the proof comes before scope and resource", toOther, { dpop: "x" }],
  ],
  "400 invalid_scope": [
    ["RFC 6749 §3.3 an unknown scope", { scope: "api2" }],
    ["RFC 6749 §3.3 an unknown scope after a granted one", { scope: "api1 api2" }],
    ["RFC 6749 §3.3 an unknown scope before a granted one", { scope: "api2 api1" }],
    ["RFC 6749 §3.3 a scope of other clients, at a resource of other clients", { scope: "read" }],
    ["RFC 6749 §3.3 a granted scope and one of other clients", as("several", "read audit")],
    ["RFC 6749 §3.3 scope in capitals", { scope: "API1" }],
    ["RFC 6749 §3.3 a space alone", { scope: " " }],
    ["RFC 6749 §3.3 a space before", { scope: " api1" }],
    ["RFC 6749 §3.3 two spaces", { scope: "api1  api1" }],
    ["RFC 6749 §3.3 a tab", { scope: "api1\tapi1" }],
    ["RFC 6749 §3.3 a comma", as("orders", "read,write")],
    ["RFC 6749 §3.3 scope __proto__", { scope: "__proto__" }],
    ["RFC 6749 §3.3 no scope, several resources", as("several")],
    ["RFC 6749 §3.2 an empty scope, several resources", as("several", "")],
    ["RFC 8707 §2.2 scopes of two resources", as("several", "api1 read")],
    ["RFC 8707 §2.2 scopes of two resources, the other way", as("several", "read api1")],
    ["RFC 8707 §2.2 a scope of another resource", { ...as("several", "api1"), resource: orders }],
    ["RFC 8707 §2.2 one more of another", { ...as("several", "read api1"), resource: orders }],
    ["RFC 8707 §2.2 an unknown scope at the resource", { scope: "api2", resource: myApi }],
  ],
  "400 invalid_target": [
    ["RFC 8707 §2 an unknown resource", { resource: "https://other.example.com" }],
    ["RFC 8707 §2 a resource where the client has no scope", { resource: audit }],
    ["RFC 8707 §2 a slash at the end", { resource: `${myApi}/` }],
    ["RFC 8707 §2 the beginning", { ...as("orders"), resource: "https://orders.example.com" }],
    ["RFC 8707 §2 a fragment", { resource: `${myApi}#x` }],
    ["RFC 8707 §2 relative", { resource: "//api.example.com" }],
    ["RFC 8707 §2 the host in capitals", { resource: "https://API.example.com" }],
    ["RFC 8707 §2 the issuer", { resource: idp.url }],
    ["RFC 8707 §2 resource __proto__", { resource: "__proto__" }],
    ["RFC 8707 §2 one resource twice", `&resource=${myApi}&resource=${myApi}`],
    ["RFC 8707 §2 two resources", `&resource=${myApi}&resource=${orders}`],
    ["RFC 8707 §2 two resources, the first one empty", `&resource=&resource=${myApi}`],
    ["RFC 8707 §2 Choice: the resource comes before the scope", { scope: "x", resource: "x" }],
  ],
};

/** RFC 6749 §5.2: for each error one text, whatever was sent. */
const texts: Record<string, string> = {};

for (const [expected, rows] of Object.entries(refused))
  for (const [rule, change, headers] of rows)
    test(`POST /connect/token, ${rule} → ${expected}`, async () => {
      const answer = await ask(change, headers);
      expect(refusalOf(answer)).toBe(expected);
      const text = (texts[expected] ??= answer.json.error_description);
      expect(answer.json.error_description).toBe(text);
      const { event, reason } = idp.lines.at(-1)!;
      expect([event, reason]).toEqual(["token refused", expect.stringMatching(/^[A-Z].{10,}\.$/)]);
      expect(reason).not.toMatch(/client_secret=|undefined/);
    });

const otherTypes = [
  ...["application/json", "text/plain", "multipart/form-data; boundary=x", `${form}2`],
  ...[`text/plain; ${form}`, `${form}, ${form}`, ""],
];

for (const type of otherTypes)
  test(`POST /connect/token, RFC 6749 §4.4.2 Content-Type "${type}" → 400 invalid_request`, async () => {
    // Before all else: neither the parameters nor the client are looked at.
    const answer = await ask({ ...wrong, scope: "\0" }, { "content-type": type });
    expect(refusalOf(answer)).toBe("400 invalid_request");
    // The caller has no access to the log, so the text says what is wanted.
    expect(answer.json.error_description).toContain(form);
  });

test("POST /connect/token, RFC 6749 §4.4.2 neither Content-Type nor body → 400 invalid_request", async () =>
  expect(refusalOf(await send(idp.tokenEndpoint, { method: "POST" }))).toBe("400 invalid_request"));

// --- Paths and methods ---------------------------------------------------------------------------

for (const method of ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
  test(`${method} /connect/token, RFC 9110 §15.5.6 → 405, Allow: POST`, async () => {
    const answer = await send(`${idp.tokenEndpoint}?${valid}`, { method });
    expect([answer.status, answer.json]).toEqual([405, undefined]);
    expect(fieldsOf(answer)).toMatchObject({ ...noStore, allow: "POST" });
  });

const unknownPaths = [
  ...["/", "/connect", "/connect/token/", "/connect/tokens", "/Connect/Token", "/connect/%74oken"],
  ...["/connect/token;x", "/connect/introspect", "/connect/authorize", "/health/", "/HEALTH"],
  ...["/.well-known/", "/.well-known/openid-configuration/", "/x/.well-known/jwks", "/idp.ts"],
  ...["/.well-known/oauth-authorization-server/connect", "/.well-known/oauth-protected-resource"],
  ...["/keys/keys.db", "/__proto__", "/constructor", "/?/health", "/x?/connect/token"],
];

for (const path of unknownPaths)
  test(`${path}, RFC 9110 §15.5.5 → 404`, async () => {
    for (const method of ["GET", "HEAD", "POST", "DELETE"]) {
      const answer = await send(idp.url + path, { method });
      expect([answer.status, answer.json]).toEqual([404, undefined]);
      expect(fieldsOf(answer)).toMatchObject(noStore);
      expect(answer.headers.has("allow")).toBe(false);
    }
  });

const { host } = new URL(idp.url);
const end = `Host: ${host}\r\nConnection: close\r\n`;
const formEnd = `${end}Content-Type: ${form}\r\n`;
const withBody = (body: string) => `${formEnd}Content-Length: ${body.length}\r\n\r\n${body}`;

/** A target need not be an absolute URL, and Host is not trusted. */
const targets: [name: string, line: string, fields: string, status: number][] = [
  ["RFC 9112 §3.2.2 absolute-form, another host", "GET http://x.y/health HTTP/1.1", end, 200],
  ["RFC 9112 §3.2.2 absolute-form without a path", `GET ${idp.url} HTTP/1.1`, end, 404],
  ["RFC 9112 §3.2.3 authority-form", "CONNECT x.example:443 HTTP/1.1", end, 404],
  ["RFC 9110 §9.3.6 CONNECT with a path", "CONNECT /health HTTP/1.1", end, 405],
  ["RFC 9112 §3.2 HTTP/1.0 without Host", "GET /health HTTP/1.0", "", 200],
  ["RFC 9112 §3.2 two slashes", "GET //health HTTP/1.1", end, 404],
  ["RFC 9112 §3.2 a path in Host", "GET /x HTTP/1.1", end.replace(host, "x/health?"), 404],
];

for (const [name, line, fields, status] of targets)
  test(`${name} → ${status}`, async () =>
    expect(await raw(idp.url, `${line}\r\n${fields}\r\n`)).toStartWith(`HTTP/1.1 ${status} `));

test("RFC 9112 §3.2 a malformed Host → an answer, and no failure", async () => {
  const answer = await raw(idp.url, `GET /health HTTP/1.1\r\n${end.replace(host, "[")}\r\n`);
  expect(answer).toMatch(/^HTTP\/1\.1 [24]/);
});

test("POST /connect/token, RFC 9068 §2.2 another Host, and X-Forwarded-Host → 200, iss as configured", async () => {
  const forwarded = "X-Forwarded-Host: x.example\r\nForwarded: host=x.example;proto=https\r\n";
  const other = forwarded + withBody(valid).replace(host, "x.example");
  const answer = await raw(idp.url, `POST http://y.example/connect/token HTTP/1.1\r\n${other}`);
  const { access_token } = JSON.parse(answer.split("\r\n\r\n")[1]!);
  expect(jose.decodeJwt(access_token).iss).toBe(idp.url);
});

// --- Sizes ---------------------------------------------------------------------------------------

const start = "POST /connect/token HTTP/1.1\r\n";
const padding = (length: number): `&${string}` => `&x=${"x".repeat(length - valid.length - 3)}`;
const inChunks = (body: string) => {
  const parts = body.match(/.{1,999}/g)!;
  const chunks = parts.map((text) => `${text.length.toString(16)}\r\n${text}\r\n`);
  return `${start}${formEnd}Transfer-Encoding: chunked\r\n\r\n${chunks.join("")}0\r\n\r\n`;
};

for (const [length, status] of [[16_384, 200] as const, [16_385, 413] as const])
  test(`POST /connect/token, RFC 9110 §15.5.14 a body of ${length} bytes → ${status}`, async () => {
    expect((await ask(padding(length))).status).toBe(status);
    const answer = await raw(idp.url, inChunks(valid + padding(length)), 50);
    expect(answer).toStartWith(`HTTP/1.1 ${status} `);
  });

// --- Unexpected failures, and the log ------------------------------------------------------------

test("POST /connect/token, RFC 9110 §15.6.1 what fails unexpectedly → 500 without the cause", async () => {
  let cause: unknown;
  const claims = Object.defineProperty({}, "broken", { enumerable: true, get: () => raise(cause) });
  const server = await startIdp({ clients: [{ ...registration, claims }] });
  for (cause of [new Error("cause ".repeat(1_000)), "cause ".repeat(1_000)]) {
    const answer = await post(server.tokenEndpoint, valid);
    expect(fieldsOf(answer)).toMatchObject(noStore);
    const constant = expect.not.stringMatching(/cause|\.ts|\bat /);
    expect([answer.status, answer.text]).toEqual([500, constant]);
    const { event, reason } = server.lines.at(-1)!;
    expect([event, reason]).toEqual(["failure", expect.stringContaining("cause cause")]);
    expect(reason).toHaveLength(2_000);
  }
  expect((await send(`${server.url}/health`)).status).toBe(200);
});

function raise(cause: unknown): never {
  throw cause;
}

test("log: one line for each request → to whom, what, by which key, or why not", async () => {
  const started = performance.now();
  const before = idp.lines.length;
  const { jti } = jose.decodeJwt((await ask({})).json.access_token);
  await ask({ scope: "x" });
  const elapsed = performance.now() - started;
  const lines = idp.lines.slice(before);
  const who = { address: "127.0.0.1", client_id: "client" };
  expect(lines.map(({ time, milliseconds, reason, ...line }) => line)).toEqual([
    { event: "token issued", ...who, scope: "api1", kid: keys[0].kid, jti },
    { event: "token refused", ...who, error: "invalid_scope" },
  ]);
  for (const { time, milliseconds } of lines) {
    expect(time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    expect(milliseconds).toBeInteger();
    expect(milliseconds).toBeWithin(0, elapsed + 1);
  }
});

const tooLong = "x".repeat(5_000);
const bounded: [name: string, change: Change, logged: number, type?: string][] = [
  ["Content-Type", {}, 100, tooLong],
  ["grant_type", { grant_type: tooLong }, 100],
  ["scope", { scope: tooLong }, 100],
  ["scope after another", { scope: `api1 ${tooLong}` }, 95],
  ["resource", { resource: tooLong }, 0],
  ["client_id", { client_id: tooLong }, 0],
];

for (const [name, change, logged, type = form] of bounded)
  test(`log: a ${name} of 5,000 characters → ${logged} of them`, async () => {
    expect((await ask(change, { "content-type": type })).status).toBeWithin(400, 402);
    const { event, reason } = idp.lines.at(-1)!;
    expect([event, reason.match(/x{9,}/)?.[0].length ?? 0]).toEqual(["token refused", logged]);
    expect(JSON.stringify(idp.lines.at(-1)).length).toBeLessThan(400);
  });
