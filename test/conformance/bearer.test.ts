/** The API: which tokens it takes (RFC 6750, RFC 9068), what it tells (RFC 9728), whose keys it trusts. */

import { createHmac } from "node:crypto";
import { cpSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import { start } from "../../api.ts";
import { resourceServer, type ResourceServerSettings as Settings } from "../../config.ts";
import { type Answer, basic, challenges, raw, send } from "../support/http.ts";
import { accessToken, Issuer, type Key, key, proof, secondsNow } from "../support/jwt.ts";
import { root, temporaryDirectory } from "../support/programs.ts";

const [signer, stranger] = [await key("ES256", "key"), await key("ES256", "stranger")];
const [rsa, es384] = [await key("RS256", "rsa"), await key("ES384", "es384")];

/** The clock of the API stands still, in the last millisecond of a second. */
const now = secondsNow();
const clock = () => now * 1000 + 999;

const servers: Bun.Server<undefined>[] = [];
afterAll(() => servers.forEach((server) => void server.stop(true)));

function issuerOf(keys: Key[]): Issuer {
  const issuer = new Issuer(keys);
  servers.push(issuer.server);
  return issuer;
}

/** An API, of api.ts or of a copy; `lines` is its log. */
async function apiOf(issuer: string, changes: Partial<Settings> = {}, startApi = start) {
  const lines: Record<string, any>[] = [];
  const log = { write: (line: string) => lines.push(JSON.parse(line)), flush: () => 0 };
  const own = { resource: "http://127.0.0.1:0", issuer, drainSeconds: 0, clock, log };
  const running = await startApi({ ...resourceServer, ...own, ...changes });
  servers.push(running.server);
  return { ...running, lines };
}

const mainIssuer = issuerOf([]);
publish(
  mainIssuer,
  ...[signer, rsa, es384].map(({ publicJwk }) => publicJwk),
  { ...rsa.publicJwk, kid: "rs512", alg: "RS512" },
  { ...stranger.publicJwk, kid: "enc", use: "enc" },
);
const main = await apiOf(mainIssuer.url);
const identity = `${main.url}/identity`;
const iss = mainIssuer.url;
const aud = main.url;
const other = "https://other.example";

type Members = Record<string, unknown>;
const token = (claims: Members = {}, header: Members = {}, by = signer) =>
  accessToken(by, iss, aud, claims, header);
const call = (authorization?: string, url = identity) =>
  send(url, authorization === undefined ? {} : { headers: { authorization } });
const bearer = async (presented: string | Promise<string>, url = identity) =>
  await call(`Bearer ${await presented}`, url);

const algs = resourceServer.acceptedAlgorithms.join(" ");

const fields = ({ status, headers }: Answer, ...names: string[]) => [
  status,
  ...names.map((name) => headers.get(name)),
];

/** Compares an answer whole: status, challenges of both schemes, and the fields around them. */
function expectRefusal(
  answer: Answer,
  status: number,
  error?: string,
  { scheme = "bearer", scope = "" } = {},
) {
  const found = challenges(answer);
  const where = { resource_metadata: `${aud}/.well-known/oauth-protected-resource` };
  const text = found[scheme]?.["error_description"] ?? "";
  const why: Record<string, string> = error ? { error, error_description: text } : {};
  if (scope) why["scope"] = scope;
  const parameters = { bearer: { ...where }, dpop: { ...where, algs }, [scheme]: {} };
  parameters[scheme] = { ...where, ...(scheme === "dpop" ? { algs } : {}), ...why };
  expect({ status: answer.status, challenges: found }).toEqual({ status, challenges: parameters });
  expect(Object.keys(found)).toEqual(["bearer", "dpop"]);
  // RFC 6750 §3: no quotation mark, no backslash; the text is there if the error is.
  expect(text).toMatch(error ? /^[ !#-[\]-~]{10,}$/ : /^$/);
  expect(answer.text).toMatch(/^[ -~]{10,}$/);
  expect(answer.headers.get("cache-control")).toBe("no-store");
  expect(answer.headers.get("retry-after")).toBeNull();
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

/** An issuer, an API that trusts it, and a clock that a test can move. */
async function trial(changes: Partial<Settings> = {}, startApi = start) {
  const issuer = issuerOf([signer]);
  const time = { ms: clock() };
  const settings = { clock: () => time.ms, ...changes };
  const { url, lines, stop } = await apiOf(issuer.url, settings, startApi);
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
  return { issuer, time, url, lines, stop, made, ask, unknown, statuses, fetches };
}

function publish(issuer: Issuer, ...keys: unknown[]): void {
  issuer.jwks = { keys };
}

const down = () => new Response("", { status: 500 });

/** Polls for what happens in the background. */
async function until(condition: () => unknown): Promise<void> {
  while (!(await condition())) await Bun.sleep(2);
}

// It takes 5 s until the API gives up; the other tests run meanwhile.
const slow = ["/openid-configuration", "/jwks"].map(async (path) => {
  const { issuer, ask } = await trial();
  const stream = () => new ReadableStream({ start: (controller) => controller.enqueue(" ") });
  issuer.answer = ({ url }) => (url.endsWith(path) ? new Response(stream()) : undefined);
  const started = performance.now();
  return { answer: await ask(), seconds: (performance.now() - started) / 1000 };
});

// --- How a token is presented --------------------------------------------------------------------

describe("GET /identity", () => {
  type Field = (token: string) => string | undefined;
  const accepts = (name: string, field: Field) =>
    test(`${name} → 200`, async () => {
      const answer = await call(field(await token()));
      expectJson(answer);
      expect(answer.json).toContainEqual({ type: "client_id", value: "client" });
    });
  accepts("RFC 6750 §2.1 a valid token", (token) => `Bearer ${token}`);
  accepts("RFC 9110 §11.1 the scheme in small letters", (token) => `bearer ${token}`);
  accepts("RFC 9110 §11.1 the scheme in capitals", (token) => `BEARER ${token}`);
  accepts("RFC 9110 §11.4 several spaces after the scheme", (token) => `Bearer   ${token}`);

  const anonymous = (name: string, field: Field) =>
    test(`RFC 6750 §3.1 ${name} → 401 without an error`, async () =>
      expectRefusal(await call(field(await token())), 401));
  anonymous("no Authorization field", () => undefined);
  anonymous("an empty Authorization field", () => "");
  anonymous("another scheme", () => basic("client", "secret"));
  anonymous("another scheme with the token", (token) => `Token ${token}`);
  anonymous("a scheme that begins like Bearer", (token) => `Bearers ${token}`);
  anonymous("a scheme that ends like Bearer", (token) => `XBearer ${token}`);
  anonymous("no space after Bearer", (token) => `Bearer${token}`);
  anonymous("a token without a scheme", (token) => token);
  anonymous("another scheme with Bearer as its credentials", () => "Digest Bearer");

  const malformed = (name: string, field: Field, scheme = "bearer") =>
    test(`RFC 6750 §3.1 ${name} → 400 invalid_request`, async () =>
      expectRefusal(await call(field(await token())), 400, "invalid_request", { scheme }));
  malformed("no token", () => "Bearer");
  malformed("no token, small letters", () => "bearer");
  malformed("no token, scheme DPoP", () => "DPoP", "dpop");
  malformed("no token, scheme dpop", () => "dpop", "dpop");
  malformed("a character outside b64token", (token) => `Bearer ${token}!`);
  malformed("a character outside b64token, DPoP", (token) => `DPoP ${token}!`, "dpop");
  malformed("a letter beyond ASCII", (token) => `Bearer ${token}\u00e4`);
  malformed("= within the token", (token) => `Bearer a=${token}`);
  malformed("= alone", () => "Bearer =");
  malformed("the token in quotes", (token) => `Bearer "${token}"`);
  malformed("two tokens", (token) => `Bearer ${token} ${token}`);
  malformed("a comma after the token", (token) => `Bearer ${token},`);
  malformed("parameters instead of a token", (token) => `Bearer token="${token}"`);
  malformed("two schemes", (token) => `Bearer ${token}, DPoP ${token}`);
  malformed("two schemes, DPoP first", (token) => `DPoP ${token}, Bearer ${token}`, "dpop");
  malformed("two schemes, the first unknown", (token) => `Basic eA==, Bearer ${token}`);
  malformed("two schemes, no space after the comma", (token) => `Basic eA==,Bearer ${token}`);
  malformed("two schemes, the second without a token", () => "Basic eA==, DPoP");

  const head = "GET /identity HTTP/1.1\r\nHost: api\r\nConnection: close\r\n";
  const several = (name: string, status: number, ...schemes: string[]) =>
    test(`RFC 6750 §3.1 ${name} → ${status}`, async () => {
      const valid = await token();
      const lines = schemes.map((scheme) => `Authorization: ${scheme} ${valid}\r\n`).join("");
      expect(await raw(aud, `${head}${lines}\r\n`)).toStartWith(`HTTP/1.1 ${status} `);
    });
  several("one field", 200, "Bearer");
  several("two Bearer fields", 400, "Bearer", "Bearer");
  several("a Bearer and a DPoP field", 400, "Bearer", "DPoP");
  several("a Basic and a Bearer field", 400, "Basic", "Bearer");

  test("RFC 6750 §2 a token in the query, a body or a cookie is never looked at", async () => {
    const valid = await token();
    expectRefusal(await send(`${identity}?access_token=${valid}`), 401);
    expectRefusal(await send(identity, { headers: { cookie: `access_token=${valid}` } }), 401);
    const form = `access_token=${valid}`;
    const type = "Content-Type: application/x-www-form-urlencoded\r\n";
    const answer = await raw(aud, `${head}${type}Content-Length: ${form.length}\r\n\r\n${form}`);
    expect(answer).toStartWith("HTTP/1.1 401 ");
    expect((await bearer(valid, `${identity}?access_token=none`)).status).toBe(200);
  });
});

// --- Which token is valid ------------------------------------------------------------------------

const base64url = (text: string) => Buffer.from(text).toString("base64url");
const headerOf = (alg: string, kid = "key") => JSON.stringify({ alg, kid, typ: "at+jwt" });
const withPart = async (index: number, text: string) =>
  (await token()).split(".").with(index, base64url(text)).join(".");
const unsigned = (jws: string) => jws.replace(/[^.]+$/, "");

/** A token whose claims are this text, byte for byte. */
async function signedText(text: string): Promise<string> {
  const jws = new jose.CompactSign(new TextEncoder().encode(text));
  return await jws.setProtectedHeader(JSON.parse(headerOf("ES256"))).sign(signer.privateKey);
}

/** A token signed with a public key as if it were a secret. */
async function symmetric(secret: string): Promise<string> {
  const input = `${base64url(headerOf("HS256", "rsa"))}.${(await token()).split(".")[1]}`;
  return `${input}.${createHmac("sha256", secret).update(input).digest("base64url")}`;
}

describe("GET /identity", () => {
  const { publicJwk: jwk } = stranger;
  const elsewhere = `${mainIssuer.url}/elsewhere`;
  type Make = () => string | Promise<string>;

  const accepts = (name: string, make: Make) =>
    test(`${name} → 200`, async () => {
      const answer = await bearer(make());
      expectJson(answer);
      expect(answer.json).toContainEqual({ type: "sub", value: "client" });
    });
  accepts("RFC 9068 §4 a valid token", () => token());
  accepts("RFC 9068 §4 typ application/at+jwt", () => token({}, { typ: "application/at+jwt" }));
  accepts("RFC 7515 §4.1.9 typ in capitals", () => token({}, { typ: "Application/AT+JWT" }));
  accepts("RFC 9068 §2.1 alg RS256", () => token({}, {}, rsa));
  accepts("RFC 9068 §4 alg ES384", () => token({}, {}, es384));
  accepts("RFC 9068 §4 aud a list of this resource", () => token({ aud: [aud] }));
  accepts("RFC 9068 §4 aud a list with this resource", () => token({ aud: [other, aud] }));
  accepts("RFC 9068 §4 exp 29 s ago", () => token({ exp: now - 29 }));
  accepts("RFC 7519 §2 exp with a fraction", () => token({ exp: now + 60.5 }));
  accepts("RFC 7519 §4.1.5 nbf 30 s ahead", () => token({ nbf: now + 30 }));
  accepts("RFC 7515 §4.1.3 a foreign jwk in the header", () => token({}, { jwk }));
  accepts("RFC 7515 §4.1.2 jku in the header", () => token({}, { jku: elsewhere }));
  accepts("RFC 7515 §4.1.5 x5u in the header", () => token({}, { x5u: elsewhere }));
  accepts("RFC 7515 §4 an unknown member in the header", () => token({}, { x: 1 }));
  accepts("RFC 7519 §4.3 an unknown claim", () => token({ "urn:x": { cnf: 1 } }));
  accepts("RFC 6749 §3.3 scope with others around it", () => token({ scope: "a api1 b" }));
  accepts("RFC 6749 §3.3 scope twice", () => token({ scope: "api1 api1" }));
  accepts("RFC 9068 §2.2.3 scope as a list", () => token({ scope: ["api1"] }));
  accepts("RFC 9068 §2.2.3 scope as a list of several", () => token({ scope: ["a", "api1"] }));

  const refuses = (name: string, make: Make) =>
    test(`${name} → 401 invalid_token`, async () => {
      const presented = await make();
      // Once and again: what was refused is not remembered.
      expectRefusal(await bearer(presented), 401, "invalid_token");
      expectRefusal(await bearer(presented), 401, "invalid_token");
    });
  const refusesClaim = (section: string, claim: string, ...values: unknown[]) => {
    for (const value of values)
      refuses(`${section} ${claim} ${JSON.stringify(value)}`, () => token({ [claim]: value }));
  };
  const types = ["JWT", "jwt", "dpop+jwt", "application/jwt", "text/at+jwt", ["at+jwt"], undefined];
  for (const typ of types)
    refuses(`RFC 9068 §4 typ ${JSON.stringify(typ)}`, () => token({}, { typ }));
  for (const alg of ["none", "NONE", "ES1024", "constructor", "RS256", "HS256"]) {
    refuses(`RFC 9068 §4 alg ${alg}`, () => withPart(0, headerOf(alg)));
    refuses(`RFC 9068 §4 alg ${alg}, no signature`, async () =>
      unsigned(await withPart(0, headerOf(alg))),
    );
  }
  refuses("RFC 8725 §2.1 HS256 with the public key as secret, PEM", async () =>
    symmetric(await jose.exportSPKI((await jose.importJWK(rsa.publicJwk)) as jose.CryptoKey)),
  );
  refuses("RFC 8725 §2.1 HS256 with the public key as secret, JWK", () =>
    symmetric(JSON.stringify(rsa.publicJwk)),
  );
  refuses("RFC 7517 §4.4 alg other than the key's", () => token({}, { kid: "rs512" }, rsa));
  refuses("RFC 9068 §4 signed with another key", () => token({}, { kid: "key" }, stranger));
  refuses("RFC 7515 §4.1.3 signed with the jwk", () => token({}, { kid: "key", jwk }, stranger));
  refuses("RFC 9068 §4 no signature", async () => unsigned(await token()));
  refuses("RFC 9068 §4 other claims", () => withPart(1, '{"sub":"root"}'));
  for (const kid of [undefined, "", "unknown", "__proto__", 7])
    refuses(`RFC 9068 §4 kid ${JSON.stringify(kid)}`, () => token({}, { kid }));
  refuses("RFC 7517 §4.2 a key for encryption", () => token({}, { kid: "enc" }, stranger));
  refusesClaim("RFC 9068 §4", "iss", undefined, other, `${iss}/`, iss.toUpperCase(), [iss], "");
  refusesClaim("RFC 9068 §4", "aud", undefined, other, `${aud}/`, aud.slice(0, -1), "client");
  refusesClaim("RFC 9068 §4", "aud", [other], [], { [aud]: aud });
  refusesClaim("RFC 9068 §4", "exp", undefined, null, `${now + 60}`);
  refuses("RFC 9068 §4 exp 30 s ago", () => token({ exp: now - 30 }));
  refusesClaim("RFC 9068 §2.2", "iat", undefined, null, `${now}`);
  refuses("RFC 7519 §4.1.5 nbf 31 s ahead", () => token({ nbf: now + 31 }));
  refusesClaim("RFC 7519 §4.1.5", "nbf", "0", null);
  for (const claim of ["sub", "client_id", "jti"])
    refusesClaim("RFC 9068 §2.2", claim, undefined, "", 7, null, ["client"]);
  refuses("RFC 7515 §4.1.11 crit with exp", () => token({}, { crit: ["exp"], exp: 1 }));
  refuses("RFC 7515 §4.1.11 crit with b64", () => token({}, { crit: ["b64"], b64: true }));
  refusesClaim("RFC 7800 §3", "cnf", null, {}, "x", { kid: "x" }, { jkt: "" }, { jkt: 7 });
  refuses("RFC 9449 §7.1 a bound token as Bearer", () => token({ cnf: { jkt: "x" } }));
  refuses("RFC 7519 §7.2 no JWT", () => "token");
  refuses("RFC 7519 §7.2 two parts", async () => (await token()).replace(/\.[^.]+$/, ""));
  refuses("RFC 7519 §7.2 five parts, as of a JWE", async () => `${await token()}.AA.AA`);
  for (const text of ["claims", '{"iss":"x"', "null", '"claims"', "[]"]) {
    refuses(`RFC 7519 §7.2 the claims are ${text}`, () => signedText(text));
    refuses(`RFC 7519 §7.2 the header is ${text}`, () => withPart(0, text));
  }

  test("RFC 9449 §7.1 a token that is not bound, as DPoP → 401, the error at DPoP", async () => {
    const answer = await call(`dpop ${await token()}`);
    expectRefusal(answer, 401, "invalid_token", { scheme: "dpop" });
  });

  test("RFC 7515 §4.1 nothing that a header names is fetched", () =>
    expect(mainIssuer.requests).not.toContain("/elsewhere"));

  const scopes = [
    ...[undefined, "", "api2", "api10", "my-api1", "API1", "api1,api2", "api1\tapi2", null, true],
    ...[[], ["api2"], ["api1 api2"], [["api1"]], { api1: "api1" }],
  ];
  for (const scope of scopes)
    test(`RFC 6750 §3.1 scope ${JSON.stringify(scope)} → 403 insufficient_scope`, async () => {
      const jti = `of ${JSON.stringify(scope)}`;
      const presented = await token({ scope, jti });
      // Once and again: the token is remembered, and yet lacks the scope.
      for (let times = 0; times < 2; times++) {
        expectRefusal(await bearer(presented), 403, "insufficient_scope", { scope: "api1" });
        const error = "insufficient_scope";
        const logged = { event: "call refused", error, client_id: "client", scope: "api1", jti };
        expect(main.lines.at(-1)).toMatchObject(logged);
      }
    });
});

describe("the log of refused calls", () => {
  const logs = (error: string, name: string, field: () => Promise<string> | string) =>
    test(`${error}, ${name}: one line with a sentence, no token`, async () => {
      const before = main.lines.length;
      const presented = await field();
      await call(presented);
      expect(main.lines).toHaveLength(before + 1);
      const line = main.lines.at(-1)!;
      expect(line).toMatchObject({ event: "call refused", error, address: "127.0.0.1" });
      expect(line["reason"]).toMatch(/^["\w]+( \S+){2,}/);
      expect(line["reason"].length).toBeLessThanOrEqual(2_000);
      expect(Number.isInteger(line["milliseconds"])).toBeTrue();
      expect(line["milliseconds"]).toBeWithin(0, 60_000);
      for (const part of presented.split(/[ .]/).filter(({ length }) => length > 20))
        expect(JSON.stringify(line)).not.toContain(part);
    });
  const crit = { crit: ["exp"], exp: 1 };
  logs("no_credentials", "none", () => "");
  logs("invalid_request", "malformed ones", async () => `Bearer ${await token()}!`);
  logs("invalid_token", "no JWT", async () => `Bearer ${unsigned(await token())}`);
  logs("invalid_token", "another aud", async () => `Bearer ${await token({ aud: other })}`);
  logs("invalid_token", "another time", async () => `Bearer ${await token({ exp: 1 })}`);
  logs("invalid_token", "no jti", async () => `Bearer ${await token({ jti: "" })}`);
  logs("invalid_token", "crit", async () => `Bearer ${await token({}, crit)}`);
  logs("invalid_token", "cnf", async () => `Bearer ${await token({ cnf: {} })}`);
  logs("invalid_token", "another scheme", async () => `DPoP ${await token()}`);
  logs("invalid_token", "long", async () => `Bearer ${await token({ iss: "x".repeat(9_000) })}`);
  logs("insufficient_scope", "none", async () => `Bearer ${await token({ scope: "" })}`);
  logs(
    "insufficient_scope",
    "long",
    async () => `Bearer ${await token({ scope: "x".repeat(9_000) })}`,
  );
  logs("invalid_dpop_proof", "none", async () => `DPoP ${await token({ cnf: { jkt: "x" } })}`);

  test("a call that is answered leaves no line", async () => {
    const before = main.lines.length;
    expect((await bearer(token())).status).toBe(200);
    expect(main.lines).toHaveLength(before);
  });
});

// --- What the API tells --------------------------------------------------------------------------

describe("GET /identity", () => {
  test("the claims as a list of types and values, each value a string", async () => {
    const text = 'a "quoted"\n\u00e4\u{1f511}';
    const single: Record<string, [claim: unknown, value: string]> = {
      iss: [iss, iss],
      sub: ["client", "client"],
      aud: [aud, aud],
      client_id: ["client", "client"],
      iat: [now, `${now}`],
      exp: [now + 60, `${now + 60}`],
      jti: ["shown", "shown"],
      number: [-1.5, "-1.5"],
      large: [9_007_199_254_740_991, "9007199254740991"],
      yes: [true, "true"],
      nothing: [null, "null"],
      empty: ["", ""],
      text: [text, text],
      address: [{ country: "NL", lines: ["a"] }, '{"country":"NL","lines":["a"]}'],
      ["__proto__"]: ["own", "own"],
    };
    const roles = ["reader", "", 7, false, null, { of: "all" }, ["nested", ["twice"]]];
    const shown = ["reader", "", "7", "false", "null", '{"of":"all"}', '["nested",["twice"]]'];
    const entries = Object.entries(single);
    const claims = Object.fromEntries(entries.map(([type, [claim]]) => [type, claim]));
    const presented = await token({ ...claims, none: [], roles, scope: ["a", "api1"] });
    const expected = [
      ...entries.map(([type, [, value]]) => ({ type, value })),
      ...["a", "api1"].map((value) => ({ type: "scope", value })),
      ...shown.map((value) => ({ type: "roles", value })),
    ];
    const byType = (a: { type: string }, b: { type: string }) => (a.type < b.type ? -1 : 1);
    // Whether the token is validated or remembered.
    for (let times = 0; times < 3; times++) {
      const answer = await bearer(presented);
      expectJson(answer);
      expect(answer.json.toSorted(byType)).toEqual(expected.toSorted(byType));
    }
  });

  test("each caller sees the claims of the token that came, once and again", async () => {
    const subjects = ["one", "two", "three", "one", "two", "three"];
    const tokens = await Promise.all(subjects.map((sub) => token({ sub })));
    for (let times = 0; times < 2; times++) {
      const answers = await Promise.all(tokens.map((presented) => bearer(presented)));
      const seen = answers.map(({ json }) => json.find(({ type }: any) => type === "sub").value);
      expect(seen).toEqual(subjects);
    }
  });
});

describe("GET /.well-known/oauth-protected-resource", () => {
  test("RFC 9728 §2 the metadata → 200, and they are where the challenge says", async () => {
    const { resource_metadata } = challenges(await call())["bearer"]!;
    const answer = await send(resource_metadata!);
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

  test("RFC 9728 §2 what is configured is what is told, and what counts", async () => {
    const acceptedAlgorithms = ["RS256"];
    const settings = { resource_name: "Orders", scope: "orders", acceptedAlgorithms };
    const { url } = await apiOf(iss, settings);
    expect((await send(`${url}/.well-known/oauth-protected-resource`)).json).toMatchObject({
      resource: url,
      resource_name: "Orders",
      scopes_supported: ["orders"],
      dpop_signing_alg_values_supported: ["RS256"],
    });
    const asked = async (claims: Members, by?: Key) => {
      const answer = await bearer(token({ aud: url, ...claims }, {}, by), `${url}/identity`);
      const { error, scope } = challenges(answer)["bearer"] ?? {};
      return [answer.status, error, scope, challenges(answer)["dpop"]?.["algs"]];
    };
    expect(await asked({})).toEqual([401, "invalid_token", undefined, "RS256"]);
    expect(await asked({}, rsa)).toEqual([403, "insufficient_scope", "orders", "RS256"]);
    expect(await asked({ scope: "orders" }, rsa)).toEqual([200, undefined, undefined, undefined]);
  });

  test("RFC 9728 §3.1 an API with a path: routes, metadata, aud and htu have it", async () => {
    const { url } = await apiOf(iss, { resource: "http://127.0.0.1:0/base/v1" });
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
    const proven = async (htu: string) => {
      const dpop = await proof(stranger, "GET", htu, bound, { iat: now });
      return await send(`${url}/identity`, { headers: { authorization: `DPoP ${bound}`, dpop } });
    };
    expect((await proven(`${url}/identity`)).status).toBe(200);
    expect((await proven(`${origin}/identity`)).status).toBe(401);
    const paths = ["/identity", "/health", "/.well-known/oauth-protected-resource", "/base/v1"];
    for (const path of paths) expect((await send(origin + path)).status).toBe(404);
    expect((await send(`${url}/health`)).status).toBe(200);
  });
});

describe("routes", () => {
  const documents = ["/identity", "/.well-known/oauth-protected-resource", "/health"];
  const known = ["allow", "cache-control", "www-authenticate"];

  for (const path of documents) {
    test(`RFC 9110 §9.3.2 HEAD ${path} → as GET, without a body`, async () => {
      const headers = { authorization: `Bearer ${await token()}` };
      const head = await send(aud + path, { method: "HEAD", headers });
      const get = await send(aud + path, { headers });
      expectJson(head);
      expect([head.text, head.headers.get("content-length")]).toEqual(["", `${get.text.length}`]);
    });
    for (const method of ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
      test(`RFC 9110 §15.5.6 ${method} ${path} → 405 with Allow`, async () => {
        const answer = await send(aud + path, { method });
        expect(fields(answer, ...known)).toEqual([405, "GET, HEAD", "no-store", null]);
      });
  }

  test("RFC 9110 §9.3.2 HEAD /identity without a token → 401 with the challenges", async () => {
    const answer = await send(identity, { method: "HEAD" });
    expectRefusal({ ...answer, text: "without a body" }, 401);
    expect(answer.text).toBe("");
  });

  const elsewhere = [
    ...["/", "/identity/", "/Identity", "/identity.json", "/%69dentity", "/__proto__", "/token"],
    ...["/.well-known/oauth-protected-resource/identity", "/.well-known/openid-configuration"],
  ];
  for (const path of elsewhere)
    test(`RFC 9110 §15.5.5 GET and POST ${path} → 404`, async () => {
      for (const method of ["GET", "POST"]) {
        const answer = await send(aud + path, { method });
        expect(fields(answer, ...known)).toEqual([404, null, "no-store", null]);
      }
    });

  const close = "Connection: close\r\n\r\n";
  const targets = (name: string, status: number, request: string) =>
    test(`RFC 9112 §3.2 ${name} → ${status}`, async () =>
      expect(await raw(aud, request)).toStartWith(`HTTP/1.1 ${status} `));
  targets("HTTP/1.0 without Host", 200, "GET /health HTTP/1.0\r\n\r\n");
  targets("HTTP/1.0 without a token", 401, "GET /identity HTTP/1.0\r\n\r\n");
  targets("HTTP/1.0 elsewhere", 404, "GET /x HTTP/1.0\r\n\r\n");
  targets("a whole URL", 200, `GET http://other.example/health HTTP/1.1\r\nHost: a\r\n${close}`);
  targets("two slashes", 404, `GET //health HTTP/1.1\r\nHost: a\r\n${close}`);
  targets("an odd Host", 200, `GET /health HTTP/1.1\r\nHost: a b/[\r\n${close}`);
  targets("CONNECT", 404, `CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n${close}`);
});

// --- The API as somebody copies it ---------------------------------------------------------------

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
      return Response.json({ again });
    },
    "GET /promote": async (request) => {
      const claims = await api.authorize(request, api.settings.scope);
      try { claims.sub = "root"; } catch {}
      try { claims.roles.push("root"); } catch {}
      return Response.json(claims);
    },
    "POST /orders": async (request) => {
      await api.authorize(request, api.settings.scope);
      return Response.json(await jsonBody(request));
    },
    "DELETE /orders": () => new Response(null, { status: 204 }),
    "GET /failure": async () => { throw new Error("The disk is on fire."); },
    "GET /health":`;
  const file = join(directory, "api.ts");
  writeFileSync(file, source.replace('"GET /health":', added));
  const { start }: typeof import("../../api.ts") = await import(file);

  const { issuer, time, url, lines, made, unknown } = await trial({ coolDownSeconds: 0 }, start);
  /** Whether the token is one that the API remembers. */
  const again = async (presented: string) => (await bearer(presented, `${url}/again`)).json.again;
  await again(await made()); // now the keys are there

  test("a token is remembered until it expires, from then on validated with leeway", async () => {
    const presented = await made({ exp: now + 100 });
    expect([await again(presented), await again(presented)]).toEqual([false, true]);
    time.ms = (now + 100) * 1000 - 1;
    expect(await again(presented)).toBeTrue();
    time.ms = (now + 100) * 1000;
    expect([await again(presented), await again(presented)]).toEqual([false, false]);
    time.ms = (now + 130) * 1000 - 1;
    expect(await again(presented)).toBeFalse();
    time.ms = (now + 130) * 1000;
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
    for (const presented of [first, second]) await again(presented);
    await Promise.all(rest.map(again));
    expect([await again(first), await again(second)]).toEqual([true, true]);
    expect(await again(last)).toBeFalse();
    expect([await again(first), await again(last)]).toEqual([false, true]);
  });

  test("all tokens are forgotten when the keys change, none when they stay", async () => {
    const presented = await made();
    expect([await again(presented), await again(presented)]).toEqual([false, true]);
    const { length } = issuer.requests;
    await unknown();
    expect(issuer.requests).toHaveLength(length + 2);
    expect(await again(presented)).toBeTrue();
    publish(issuer, signer.publicJwk, stranger.publicJwk);
    await unknown();
    expect([await again(presented), await again(presented)]).toEqual([false, true]);
    publish(issuer, stranger.publicJwk);
    await unknown();
    expect((await bearer(presented, `${url}/again`)).status).toBe(401);
    publish(issuer, signer.publicJwk);
  });

  test("what a handler writes to the claims does not reach the next call", async () => {
    const presented = await made({ roles: ["reader"] });
    for (let times = 0; times < 2; times++) {
      const { json } = await bearer(presented, `${url}/promote`);
      expect(json).toMatchObject({ sub: "client", roles: ["reader"] });
    }
  });

  const post = async (body: string, authorization = "") =>
    await send(`${url}/orders`, { method: "POST", headers: { authorization }, body });
  test("RFC 8259 §2 POST /orders with a JSON body → 200, a malformed or no body → 400", async () => {
    const authorization = `Bearer ${await made()}`;
    expect((await post('{"of":1}', authorization)).json).toEqual({ of: 1 });
    for (const body of ['{"of":', ""]) {
      const answer = await post(body, authorization);
      expect(fields(answer, "www-authenticate")).toEqual([400, null]);
      expect(answer.text).toMatch(/^[ -~]{10,}$/);
      expect(lines.at(-1)).toMatchObject({ event: "call refused", error: "malformed_body" });
    }
  });

  test("RFC 9110 §15.5.14 POST /orders: without a token → 401, over 1 MiB → 413", async () => {
    expect((await post("x".repeat(1_048_576))).status).toBe(401);
    expect((await post("x".repeat(1_048_577))).status).toBe(413);
  });

  test("RFC 9110 §15.5.6 GET /orders → 405, Allow names what there is", async () => {
    for (const method of ["GET", "HEAD", "PUT"])
      expect(fields(await send(`${url}/orders`, { method }), "allow")).toEqual([
        405,
        "POST, DELETE",
      ]);
    expect((await send(`${url}/orders`, { method: "DELETE" })).status).toBe(204);
  });

  test("RFC 9110 §15.6.1 an unexpected failure → 500, a constant text, the cause logged", async () => {
    const answer = await send(`${url}/failure`);
    expect(fields(answer, "cache-control")).toEqual([500, "no-store"]);
    expect(answer.text).not.toContain("fire");
    const reason = expect.stringContaining("The disk is on fire.");
    expect(lines.at(-1)).toMatchObject({ event: "failure", reason });
  });
});

// --- Keys of the issuer --------------------------------------------------------------------------

describe("a fetch of the keys", () => {
  const good = signer.publicJwk;
  const megabyte = 1_048_576;
  const junk = (changes: object) => ({ ...stranger.publicJwk, kid: "junk", ...changes });
  const junkOfKinds: unknown[] = [
    ...[null, "key", 7, [good], {}, junk({ kty: undefined }), junk({ kty: "ECX" })],
    ...[junk({ kty: "XEC" }), { kty: "oct", kid: "key", k: "AAAA" }],
  ];
  const documents = ["/openid-configuration", "/jwks"];
  const padded = (document: unknown, bytes: number) => {
    const text = JSON.stringify(document);
    return new Response(text + " ".repeat(bytes - text.length));
  };
  const zipped = (document: unknown) => {
    const headers = { "content-encoding": "gzip" };
    return new Response(Bun.gzipSync(JSON.stringify(document)), { headers });
  };
  const endless = () => {
    const chunk = new Uint8Array(65_536).fill(0x20);
    return new Response(new ReadableStream({ pull: (controller) => controller.enqueue(chunk) }));
  };

  type Deviate = (issuer: Issuer) => void;
  const metadata = (changes: (url: string) => object) => (issuer: Issuer) => {
    issuer.metadata = { ...(issuer.metadata as object), ...changes(issuer.url) };
  };
  const set =
    (...keys: unknown[]) =>
    (issuer: Issuer) =>
      publish(issuer, ...keys);
  /** The issuer answers something else in place of one of its two documents. */
  const instead = (path: string, answer: (document: unknown) => Response) => (issuer: Issuer) => {
    const document = path === "/jwks" ? issuer.jwks : issuer.metadata;
    issuer.answer = ({ url }) => (url.endsWith(path) ? answer(document) : undefined);
  };

  const works = (name: string, deviate: Deviate) =>
    test(`${name} → 200`, async () => {
      const { issuer, ask } = await trial();
      deviate(issuer);
      expect((await ask()).status).toBe(200);
    });
  works("RFC 8414 §3.2 valid metadata and a valid JWK Set", () => {});
  works(
    "RFC 8414 §3.2 unknown metadata",
    metadata(() => ({ x: { jwks_uri: "x" } })),
  );
  const jwks_uri = `${issuerOf([signer]).url}/tenant/jwks?version=2`;
  works(
    "RFC 8414 §2 a jwks_uri elsewhere, with a query",
    metadata(() => ({ jwks_uri })),
  );
  works("RFC 7517 §5 an unknown member", (issuer) => (issuer.jwks = { keys: [good], x: 1 }));
  const full = (document: unknown) => padded(document, megabyte);
  for (const path of documents) works(`${path} of 1 MiB`, instead(path, full));
  for (const odd of junkOfKinds)
    works(`RFC 7517 §5 the key among ${JSON.stringify(odd)}`, set(odd, good, odd));
  works("RFC 7517 §5 a broken key", set({ kty: "EC", kid: "x" }, good));
  works("RFC 7517 §4.5 an RSA key of the same kid", set({ ...rsa.publicJwk, kid: "key" }, good));
  works("RFC 7517 §4.2 the same kid with use enc", set(junk({ use: "enc", kid: "key" }), good));
  works("RFC 7517 §4.2 a key with use", set({ ...good, use: "sig" }));
  works("RFC 7517 §4.4 no alg", set({ ...good, alg: undefined }));

  const fails = (name: string, deviate: Deviate) =>
    test(`${name} → 503, Retry-After`, async () => {
      const { issuer, ask, lines } = await trial();
      deviate(issuer);
      expectUnavailable(await ask());
      const reason = expect.stringMatching(/^\w+( \S+){2,}/);
      const expected = { event: "call refused", error: "temporarily_unavailable", reason };
      expect(lines.at(-1)).toMatchObject(expected);
      expect(issuer.requests).not.toContain("/elsewhere");
    });
  const headers = { location: "/elsewhere" };
  const junkTexts = ["", "{", "null", "[]", '"text"', "7", "{}", '{"keys":null}', '{"keys":{}}'];
  for (const path of documents) {
    for (const status of [201, 203, 301, 302, 303, 307, 308, 404, 500, 503]) {
      const answer = (document: unknown) => Response.json(document, { status, headers });
      fails(`RFC 8414 §3.2 ${path} with status ${status}`, instead(path, answer));
    }
    for (const text of junkTexts) {
      const answer = () => new Response(text);
      fails(`RFC 8259 §2 ${path} is '${text}'`, instead(path, answer));
    }
    const tooLong = (document: unknown) => padded(document, megabyte + 1);
    fails(`${path} a byte over 1 MiB`, instead(path, tooLong));
    fails(`${path} without end`, instead(path, endless));
    fails(`${path} in gzip, which is not unpacked`, instead(path, zipped));
  }
  fails(
    "RFC 8414 §3.3 another issuer",
    metadata(() => ({ issuer: other })),
  );
  fails(
    "RFC 8414 §3.3 no issuer",
    metadata(() => ({ issuer: undefined })),
  );
  fails(
    "RFC 8414 §3.3 issuer with a slash",
    metadata((url) => ({ issuer: `${url}/` })),
  );
  fails(
    "RFC 8414 §3.3 issuer in a list",
    metadata((url) => ({ issuer: [url] })),
  );
  const data = `data:application/json,${JSON.stringify({ keys: [good] })}`;
  for (const uri of [undefined, "", 7, "/jwks", "https://", data])
    fails(
      `RFC 8414 §2 jwks_uri ${String(uri).slice(0, 9)}`,
      metadata(() => ({ jwks_uri: uri })),
    );
  // 0.0.0.0 reaches this machine, but is no loopback address.
  const away = (url: string) => ({ jwks_uri: `${url.replace("127.0.0.1", "0.0.0.0")}/jwks` });
  fails("RFC 8414 §2 jwks_uri of http beyond loopback", metadata(away));
  for (const odd of junkOfKinds) fails(`RFC 7517 §5 ${JSON.stringify(odd)} alone`, set(odd));

  test("RFC 7517 §5 a token of a broken key → 401, of a sound one → 200", async () => {
    const { issuer, ask, statuses } = await trial();
    publish(issuer, { kty: "EC", kid: "broken", alg: "ES256" }, good);
    expect(await statuses(() => ask(signer, { kid: "broken" }), ask)).toEqual([401, 200]);
  });
});

describe("the keys of the issuer", () => {
  test("RFC 9110 §10.2.3 no keys → 503, and one fetch in a cool-down", async () => {
    const { issuer, time, ask, unknown, fetches } = await trial({ coolDownSeconds: 7 });
    issuer.answer = down;
    expect(fetches()).toBe(0);
    for (const next of [ask, unknown, ask]) expectUnavailable(await next(), "7");
    expect(fetches()).toBe(1);
    issuer.answer = undefined;
    time.ms += 6_999;
    expectUnavailable(await ask(), "7");
    time.ms += 1;
    expect([(await ask()).status, fetches()]).toEqual([200, 2]);
  });

  test("calls at once share one fetch", async () => {
    const { ask, unknown, statuses, fetches } = await trial();
    const calls = Array.from({ length: 20 }, (_, n) => (n % 2 ? unknown : ask));
    const seen = await Promise.all(calls.map((next) => statuses(next)));
    expect(seen).toEqual(calls.map((next) => [next === ask ? 200 : 401]));
    expect(fetches()).toBe(1);
  });

  test("an unknown kid within the cool-down of a good fetch → 401, no fetch", async () => {
    const { ask, unknown, statuses, fetches } = await trial({ coolDownSeconds: 60 });
    const seen = await statuses(ask, ...Array(60).fill(unknown));
    expect([...new Set(seen), fetches()]).toEqual([200, 401, 1]);
  });

  test("an unknown kid fetches within the same call, and the new key counts", async () => {
    const { issuer, ask, statuses, fetches } = await trial({ coolDownSeconds: 0 });
    const fresh = () => ask(stranger);
    expect(await statuses(ask, fresh)).toEqual([200, 401]);
    expect(fetches()).toBe(2);
    publish(issuer, signer.publicJwk, stranger.publicJwk);
    expect(await statuses(fresh, fresh, ask)).toEqual([200, 200, 200]);
    expect(fetches()).toBe(3);
  });

  test("an unknown kid, the issuer down → 503, once more within the cool-down", async () => {
    const played = await trial({ coolDownSeconds: 0.02 });
    const { issuer, time, ask, unknown, statuses, fetches } = played;
    expect(await statuses(ask)).toEqual([200]);
    issuer.answer = down;
    time.ms += 20;
    await until(async () => (await unknown()).status === 503);
    const failed = fetches();
    // A key that is known goes on to count.
    expect(await statuses(unknown, ask, unknown)).toEqual([503, 200, 503]);
    expect(fetches()).toBe(failed);
    issuer.answer = undefined;
    time.ms += 20;
    await until(async () => (await unknown()).status === 401);
  });

  test("a junk set changes nothing, an empty one withdraws all keys, also at first", async () => {
    const { issuer, ask, unknown, statuses } = await trial({ coolDownSeconds: 0 });
    publish(issuer);
    expect(await statuses(ask)).toEqual([401]);
    publish(issuer, signer.publicJwk);
    expect(await statuses(ask)).toEqual([200]);
    publish(issuer, { kty: "oct", k: "AAAA" });
    expect(await statuses(unknown, ask)).toEqual([503, 200]);
    publish(issuer);
    expect(await statuses(unknown, ask)).toEqual([401, 401]);
  });

  test("another key under the same kid → tokens of the old one are refused", async () => {
    const { issuer, ask, unknown, statuses } = await trial({ coolDownSeconds: 0 });
    const renewed = () => ask(stranger, { kid: "key" });
    expect(await statuses(ask, renewed)).toEqual([200, 401]);
    publish(issuer, { ...stranger.publicJwk, kid: "key" });
    expect(await statuses(unknown, ask, renewed)).toEqual([401, 401, 200]);
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
    await until(() => fetches() > 2);
    issuer.answer = down;
    await until(() => lines.length > 1);
    for (const line of lines) {
      const reason = expect.stringMatching(/^\w+( \S+){2,}/);
      expect(line).toMatchObject({ event: "keys not fetched", reason });
    }
    expect(await statuses(remembered, ask)).toEqual([200, 200]);
    publish(issuer, stranger.publicJwk);
    issuer.answer = undefined;
    await until(async () => (await remembered()).status === 401);
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
  });
});

describe("GET /health", () => {
  test("without keys → 503, and they are fetched; with keys → 200, and none are", async () => {
    const { issuer, url, fetches } = await trial({ coolDownSeconds: 0 });
    issuer.answer = down;
    const before = await send(`${url}/health`);
    expect([before.status, before.json]).toEqual([503, { status: "unavailable" }]);
    expect(before.headers.get("cache-control")).toBe("no-store");
    issuer.answer = undefined;
    await until(async () => (await send(`${url}/health`)).status === 200);
    const fetched = fetches();
    const answer = await send(`${url}/health`);
    expectJson(answer);
    expect([answer.json, fetches()]).toEqual([{ status: "ok" }, fetched]);
  });

  test("while stopping → 503, and Connection: close on every answer", async () => {
    // It drains until the tests are over.
    const { url, made, stop } = await trial({ drainSeconds: 600 });
    const presented = await made();
    const answers = async () => [
      await bearer(presented, `${url}/identity`),
      ...(await Promise.all(["/identity", "/nothing", "/health"].map((path) => send(url + path)))),
    ];
    const seen = async () =>
      (await answers()).map(({ status, headers }) => [status, headers.get("connection")]);
    expect(await seen()).toEqual([200, 401, 404, 200].map((status) => [status, null]));
    void stop();
    expect(await seen()).toEqual([200, 401, 404, 503].map((status) => [status, "close"]));
  });
});

test("documents of the issuer that never end → 503 after 5 s", async () => {
  for (const { answer, seconds } of await Promise.all(slow)) {
    expectUnavailable(answer);
    expect(seconds).toBeWithin(4, 60);
  }
}, 60_000);
