/** The client: what it sends, what it takes, how long it keeps a token, and what it says if it fails. */

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import type { ClientSettings } from "../../config.ts";
import { padded, plain, play as playServer, rowsOf, zipped } from "../support/http.ts";
import { freePort } from "../support/databases.ts";
import type { Received, Reply } from "../support/http.ts";
import { assertionType, key, secondsNow } from "../support/jwt.ts";
import { launch, temporaryDirectory } from "../support/programs.ts";
import { tokenSource } from "../support/servers.ts";

type Parts = { [kind in Received["kind"]]?: Reply } & { client?: Partial<ClientSettings> };

const client_secret = "correct+horse%battery";
const validMetadata = (issuer: string) => ({ issuer, token_endpoint: `${issuer}/token` });

/** A server that plays the issuer and the API, and a client of both. */
function play({ client, ...replies }: Parts = {}) {
  const token_type = client?.dpop ? "DPoP" : "Bearer";
  const { origin, requests, of } = playServer({
    metadata: ({ origin }) => validMetadata(origin),
    token: ({ nth }) => ({ access_token: `token-${nth}`, token_type, expires_in: 3600 }),
    api: () => plain("yes"),
    ...replies,
  });
  const tokens = tokenSource(origin, { resource: origin, client_secret, ...client });
  const seen = () => requests.map(({ method, target }) => `${method} ${target}`);
  return { origin, tokens, requests, of, seen, api: `${origin}/identity` };
}

/** Nobody may send it anything. */
const stranger = play();
const other = stranger.origin;
const location = `${other}/token`;

const discovery = "GET /.well-known/openid-configuration";
const challenge = (value: string, status = 401) =>
  plain("no", status, { "www-authenticate": value });
const withQuery: Reply = ({ origin }) => {
  return { issuer: origin, token_endpoint: `${origin}/token?a=1` };
};
const token = (nth: number, more: object = { expires_in: 3600 }) => {
  return { access_token: `token-${nth}`, token_type: "Bearer", ...more };
};
const validResponse = token(1);
const megabyte = 1_048_576;
const redirects = [301, 302, 303, 307, 308];

/** Why it failed: one line in ASCII with a hint at its end, and without a secret or a token. */
async function messageOf(failing: Promise<unknown>): Promise<string> {
  const error = await failing.then(
    () => new Error("it did not fail"),
    (error: unknown) => error as Error,
  );
  expect(error.message).toMatch(/^[ -~]{1,700}$/);
  expect(error.message).not.toMatch(/correct.horse|token-\d/);
  return error.message;
}

// --- Discovery and the token request -------------------------------------------------------------

const taken: [rule: string, metadata: Reply][] = [
  ["RFC 8414 §3.2 valid metadata", ({ origin }) => validMetadata(origin)],
  ["RFC 8414 §3.2 metadata of 1 MiB", ({ origin }) => padded(validMetadata(origin), megabyte)],
  ["RFC 8414 §3.2 unknown metadata", ({ origin }) => ({ ...validMetadata(origin), x: [1] })],
  ["RFC 8259 §11 as text", ({ origin }) => plain(JSON.stringify(validMetadata(origin)))],
  ["RFC 6749 §3.2 a token_endpoint with a query", withQuery],
];

for (const [rule, metadata] of taken)
  test(`discovery, ${rule} → a token from that endpoint`, async () => {
    const { tokens, seen, requests } = play({ metadata });
    expect(await tokens.accessToken()).toMatchObject({ access_token: "token-1" });
    expect(seen()).toEqual([discovery, `POST /token${metadata === withQuery ? "?a=1" : ""}`]);
    expect(requests[0]!.headers.get("authorization")).toBeNull();
  });

test("discovery, RFC 8414 §2, RFC 6750 §5.3 an issuer or an API of http beyond loopback → nothing is sent", async () => {
  const { origin, requests } = play();
  const far = origin.replace("127.0.0.1", "0.0.0.0");
  const issuer = tokenSource(far, { resource: origin });
  expect(await messageOf(issuer.fetch(`${origin}/identity`))).toStartWith("ISSUER ");
  const resource = tokenSource(origin, { resource: far });
  expect(await messageOf(resource.fetch(`${far}/identity`))).toStartWith("API_URL ");
  expect(requests).toEqual([]);
});

const pairs = ["a:b|c:d:", "a+b|c+d", "a%b|100%25", "a&b=c/d|e&f=g/h?#", `a"b'c\\d|"'\\(!*~)`];

for (const pair of [...pairs, "a b| c ", "cli\u00ebnt|\u20ac\u{1f511}", "a\tb|c\n\r\u007f"])
  test(`the token request, RFC 6749 §4.4.2, RFC 6749 Appendix B ${JSON.stringify(pair)} → encoded`, async () => {
    const [client_id = "", client_secret = ""] = pair.split("|");
    const { tokens, of } = play({ client: { client_id, client_secret, scope: "api1 read" } });
    await tokens.accessToken();
    const { body, headers } = of("token")[0]!;
    expect(body).toBe("grant_type=client_credentials&scope=api1+read");
    expect(headers.get("content-type")).toStartWith("application/x-www-form-urlencoded");
    const halves = atob(headers.get("authorization")!.replace(/^Basic /, "")).split(":");
    expect(halves.join("")).toMatch(/^[!-~]+$/);
    // As a form decodes it, which is what the other side does.
    const decoded = halves.map((half) => new URLSearchParams(`x=${half}`).get("x"));
    expect([decoded, headers.get("dpop")]).toEqual([[client_id, client_secret], null]);
  });

const directory = temporaryDirectory();
function file(name: string, content: unknown): string {
  const text = typeof content === "string" ? content : JSON.stringify(content);
  writeFileSync(join(directory, name), text);
  return join(directory, name);
}

for (const [alg, kid] of [["ES256", "one"], ["ES256"], ["PS256", "one"], ["ML-DSA-44", "one"]])
  test(`the token request, RFC 7523 §3 CLIENT_KEY for ${alg}, kid ${kid} → an assertion`, async () => {
    const { privateJwk, publicJwk } = await key(alg);
    const keyFile = file(`${alg}.jwk`, { ...privateJwk, kid });
    const client = { keyFile, client_id: "signer" };
    const { origin, tokens, of } = play({ token: () => token(1, {}), client });
    const before = secondsNow();
    for (let times = 0; times < 2; times++) await tokens.accessToken();
    const jtis = new Set<unknown>();
    for (const { headers, body } of of("token")) {
      expect(headers.get("authorization")).toBeNull();
      const { client_assertion = "", ...rest } = Object.fromEntries(new URLSearchParams(body));
      const grant = { grant_type: "client_credentials", scope: "api1" };
      expect(rest).toEqual({ ...grant, client_assertion_type: assertionType });
      const { payload, protectedHeader } = await jose.jwtVerify(client_assertion, publicJwk);
      const typ = "client-authentication+jwt";
      expect(protectedHeader).toEqual({ alg: alg!, typ, ...(kid && { kid }) });
      const { jti, iat = 0, ...claims } = payload;
      // RFC 7523bis: the issuer, as a string.
      expect(claims).toEqual({ iss: "signer", sub: "signer", aud: origin, exp: iat + 60 });
      expect(iat).toBeWithin(before, secondsNow() + 1);
      expect(jti).toMatch(/^.{16,}$/);
      jtis.add(jti);
    }
    expect(jtis.size).toBe(2);
  });

test("the token request, RFC 7523 §3 CLIENT_KEY that is no private JWK with alg → not sent", async () => {
  const { privateJwk, publicJwk } = await key();
  const unusable = [
    ...["", `-----BEGIN PRIVATE KEY-----\n${client_secret}\n`, "null", "[]", { alg: "ES256" }],
    ...[publicJwk, { ...privateJwk, alg: undefined }, { ...privateJwk, alg: "RS256" }],
    { ...privateJwk, alg: "none" },
  ];
  const files = unusable.map((content, n) => file(`unusable-${n}`, content));
  for (const keyFile of [...files, join(directory, "missing")]) {
    const { tokens, of } = play({ client: { keyFile } });
    const message = await messageOf(tokens.accessToken());
    expect(message).toStartWith("CLIENT_KEY ");
    expect(message).toContain(keyFile);
    expect(of("token")).toEqual([]);
  }
});

// --- The token response --------------------------------------------------------------------------

const usable: [rule: string, change: object, dpop?: boolean][] = [
  ["RFC 6749 §5.1 a valid one", {}],
  ["RFC 6749 §5.1 token_type bearer", { token_type: "bearer" }],
  ["RFC 6749 §5.1 token_type BEARER", { token_type: "BEARER" }],
  ["RFC 9449 §5 a bound token", { token_type: "DPoP" }, true],
  ["RFC 9449 §5 token_type dpop", { token_type: "dpop" }, true],
  ["RFC 6750 §2.1 all characters", { access_token: "aZ09-._~+/==" }],
  ["RFC 6749 §5.1 unknown members", { refresh_token: "x", scope: "api1 api2" }],
  ["RFC 6749 §5.1 no expires_in", { expires_in: undefined }],
  ["RFC 6749 §5.1 expires_in 1", { expires_in: 1 }],
];

for (const [rule, change, dpop = false] of usable)
  test(`the token response, ${rule} → taken as it is`, async () => {
    const response = { ...validResponse, ...change };
    const { tokens, api, of } = play({ token: () => response, client: { dpop } });
    expect(await tokens.accessToken()).toEqual(response);
    await tokens.fetch(api);
    const field = `${response.token_type} ${response.access_token}`;
    expect(of("api")[0]!.headers.get("authorization")).toBe(field);
  });

// --- What fails, and what is said about it -------------------------------------------------------

/** An answer that the client refuses, and what its message has: OWN and HOST are of the server. */
type Failure = { says: (string | RegExp)[]; parts: Parts };
const filled = (text: string, origin: string) =>
  text.replaceAll("OWN", origin).replaceAll("HOST", origin.slice(7));

const ofMetadata = (metadata: Reply, ...says: string[]): Failure => ({ says, parts: { metadata } });
const ofToken = (answer: Reply, ...says: (string | RegExp)[]): Failure => ({
  says: says.map((text) => (typeof text === "string" ? `/token: ${text}` : text)),
  parts: { token: answer },
});

/** A member of the metadata, or of the token response, that is wrong: it is named and shown. */
const metadataWith = (name: string) => (value: unknown) => {
  const members = { issuer: "OWN", token_endpoint: "OWN/token", [name]: value };
  const reply: Reply = ({ origin }) => JSON.parse(filled(JSON.stringify(members), origin));
  return ofMetadata(reply, ` ${name} is `, JSON.stringify(value) ?? name);
};
const bound = ({ says, parts }: Failure) => ({ says, parts: { ...parts, client: { dpop: true } } });
const tokenWith =
  (name: string, token_type = "Bearer") =>
  (value: unknown) => {
    const shown = name === "access_token" ? "" : (JSON.stringify(value) ?? "undefined");
    const answer = () => ({ ...validResponse, token_type, [name]: value });
    const failure = ofToken(answer, `${name} is ${shown}`);
    return token_type === "DPoP" ? bound(failure) : failure;
  };

const gzipped: Reply = ({ origin }) => zipped(JSON.stringify(validMetadata(origin)));
const tooLong: Reply = ({ origin }) => padded(validMetadata(origin), megabyte + 1);
const withStatus =
  (status: number) =>
  ({ origin }: Received) =>
    Response.json(validMetadata(origin), { status, headers: { location } });
const statuses = [201, ...redirects, 404, 500];
const endpoints = [
  ...[`${other}/token`, `http://HOST@${other.slice(7)}/token`, "OWN.other.example/token"],
  ...["OWN1/token", "ftp://HOST/token", "/token", "OWN/token#a", "http://a:b@HOST/token"],
  ...[undefined, null, ["OWN/token"]],
];
const noMetadata = ["null", "[]", "7", "<html>", ""];
const noDocument: [rule: string, failure: Failure][] = [
  ...rowsOf("RFC 8414 §3.3 issuer", [other, "OWN/", ["OWN"], undefined], metadataWith("issuer")),
  ...rowsOf("RFC 8414 §2 token_endpoint", endpoints, metadataWith("token_endpoint")),
  ...rowsOf("RFC 8414 §3.2 metadata", noMetadata, (text) => ofMetadata(() => plain(text))),
  ...rowsOf("RFC 8414 §3.2 status", statuses, (n) => ofMetadata(withStatus(n), ` ${n}`)),
  ["RFC 8414 §3.2 status 204", ofMetadata(() => new Response(null, { status: 204 }), " 204")],
  ["RFC 8414 §3.2 metadata in gzip", ofMetadata(gzipped)],
  ["RFC 8414 §3.2 metadata over 1 MiB", ofMetadata(tooLong)],
];

const noTokens = [undefined, null, "", 12345, ["token-1"]];
const malformed = ["token-1 x", "token-1\r\nx: y", "token-1=x", "=", "token-\u00e9"];
const noTypes = [undefined, null, "", "mac", "Bearer x", "DPoP", 7, ["Bearer"], { Bearer: 1 }];
const noLifetimes = [0, -1, null, "soon", "3600", {}, [60], true];
const noToken: [rule: string, failure: Failure][] = [
  ...rowsOf("RFC 6749 §5.1 access_token", noTokens, tokenWith("access_token")),
  ...rowsOf("RFC 6750 §2.1 access_token", malformed, tokenWith("access_token")),
  ...rowsOf("RFC 6749 §7.1 token_type", noTypes, tokenWith("token_type")),
  ...rowsOf("RFC 9449 §5 token_type", ["Bearer", undefined], tokenWith("token_type", "DPoP")),
  ...rowsOf("RFC 6749 §5.1 expires_in", noLifetimes, tokenWith("expires_in")),
  ...rowsOf("RFC 6749 §5.1, RFC 9110 §15.4 status", [201, ...redirects, 500], (status) => {
    const init = { status, headers: { location } };
    return ofToken(() => Response.json(validResponse, init), `${status}`);
  }),
  ["RFC 6749 §5.1 a form", ofToken(() => plain("access_token=token-1&token_type=Bearer"), "200")],
  ["RFC 6749 §5.1 JSON null", ofToken(() => plain("null"), "200")],
  ["RFC 6749 §5.1 gzip", ofToken(() => zipped(JSON.stringify(validResponse)))],
  ["RFC 6749 §5.1 over 1 MiB", ofToken(() => padded(validResponse, megabyte + 1))],
];

const members =
  (json: unknown, status = 400) =>
  () =>
    Response.json(json, { status });
const code = (error: string, status = 400) => members({ error }, status);
const described = (error_description: string) => members({ error: "x", error_description });
const inChallenge = () => challenge('Basic realm="x", error="invalid_client"');
const control = "a\u0000b\tc\r\nd\u001b[2Je\u007f";
const escaped = "a\\u0000b\\u0009c\\u000d\\u000ad\\u001b[2Je\\u007f";
const wide = "\u00e9\u0085\u202e\u2028\u{1f511}";
const wideEscaped = "\\u00e9\\u0085\\u202e\\u2028\\ud83d\\udd11";
const y = "y".repeat(194);

const messages: [rule: string, failure: Failure][] = [
  ["RFC 6749 §5.2 code and description", ofToken(described("No such."), "400 x No such. (")],
  ["RFC 6749 §5.2 a code alone", ofToken(code("any_code"), "400 any_code (", /\(.*ISSUER.*\)$/)],
  ["RFC 6749 §5.2 no JSON", ofToken(() => plain("<h1>Bad Gateway</h1>", 502), "502 (")],
  ["RFC 6749 §5.2 no text", ofToken(members({ error: 7, error_description: ["x"] }), "400 (")],
  ["RFC 6750 §3 the code in the challenge", ofToken(inChallenge, "401 invalid_client (")],
  ["RFC 6750 §3 no code there", ofToken(() => challenge('Basic realm="x"'), "401 (")],
  ["RFC 6749 §5.2 control characters", ofToken(described(control), `400 x ${escaped} (`)],
  ["RFC 6749 §5.2 what is not ASCII", ofToken(described(wide), `400 x ${wideEscaped} (`)],
  ["RFC 6749 §5.2 200 characters", ofToken(described(y), `400 x ${y} (`)],
  ["RFC 6749 §5.2 more than 200", ofToken(described(`${y}NO`), `400 x ${y} (`)],
  ["RFC 6749 §5.2 a wrong secret", ofToken(code("invalid_client", 401), /\(.*CLIENT_SECRET.*\)$/)],
  ["RFC 6749 §5.2 a wrong scope", ofToken(code("invalid_scope"), /\(.*SCOPE.*\)$/)],
  ["RFC 6750 §3.1 no scope", ofToken(code("insufficient_scope", 403), /\(.*SCOPE.*\)$/)],
  ["RFC 9449 §5 no proof", ofToken(code("invalid_dpop_proof"), /\(.*DPOP=1.*\)$/)],
  ["RFC 9449 §5 a wrong proof", bound(ofToken(code("invalid_dpop_proof"), /\(.*clock.*\)$/))],
  ["RFC 6749 §5.2 part of a code", ofToken(code("not invalid_client"), /\(.*ISSUER.*\)$/)],
  ["RFC 6749 §7.1 token_type", ofToken(() => token(1, { token_type: "mac" }), /\(.*DPOP.*\)$/)],
];
for (const [rule, { says, parts }] of [...noDocument, ...noToken, ...messages])
  test(`${parts.metadata ? "discovery" : "the token request"}, ${rule} → an error`, async () => {
    const { tokens, api, origin, seen } = play(parts);
    const message = await messageOf(tokens.fetch(api));
    const place = parts.metadata ? "/.well-known/openid-configuration" : "/token";
    // What failed where, what was wrong, and in parentheses what to try.
    expect(message).toContain(`${origin}${place}: `);
    expect(message).toMatch(/: [^(]*[a-z\d]{3,}.* \(.+\)$/);
    for (const text of says)
      expect(message).toMatch(typeof text === "string" ? filled(text, origin) : text);
    expect(seen()).toEqual(parts.metadata ? [discovery] : [discovery, "POST /token"]);
    expect(stranger.requests).toEqual([]);
  });

test("the token request, an address of the issuer → is escaped and cut too", async () => {
  const path = `/\u001b[2J\u202e${"y".repeat(200)}NO`;
  const { tokens, origin } = play({
    metadata: ({ origin: issuer }) => ({ issuer, token_endpoint: issuer + path }),
    api: () => plain("", 500),
  });
  const message = await messageOf(tokens.accessToken());
  expect(message).toContain(` ${`${origin}/\\u001b[2J\\u202e`.padEnd(200, "y")}: 500`);
});

test("discovery, nobody listens → what to start; hints about proxies are for other hosts", async () => {
  const port = freePort();
  const said = (issuer: string, proxyVariable: string | undefined) =>
    messageOf(tokenSource(issuer, { proxyVariable }).accessToken());
  const [near, away] = [`http://127.0.0.1:${port}`, "https://issuer.invalid"];
  expect(await said(near, "HTTPS_PROXY")).toMatch(/ECONNREFUSED.*\(.*bun start.*\)$/);
  expect(await said(away, "HTTPS_PROXY")).toMatch(/\(.*(HTTPS_PROXY).*\)$/);
  expect(await said(away, undefined)).not.toContain("HTTPS_PROXY");
});

// --- Keeping a token -----------------------------------------------------------------------------

/** A client with a clock of its own; `count` asks for a token and says how many there were. */
function timed(expires_in: unknown, takesSeconds = 0) {
  const time = { ms: Date.UTC(2030, 0, 1) };
  const reply: Reply = ({ nth }) => {
    time.ms += takesSeconds * 1000;
    return token(nth, { expires_in });
  };
  const played = play({ token: reply, client: { clock: () => time.ms } });
  const count = async () => {
    await played.tokens.accessToken();
    return played.of("token").length;
  };
  return { ...played, time, count };
}

const lifetimes: [name: string, expires_in: number, kept: number, takesSeconds?: number][] = [
  ["expires_in 3600", 3600, 3540],
  ["expires_in 121", 121, 61],
  ["expires_in 120", 120, 60],
  ["expires_in 119", 119, 59.5],
  ["expires_in 1", 1, 0.5],
  ["a lifetime that counts from before the request", 3600, 3440, 100],
];

for (const [name, expires_in, kept, takesSeconds] of lifetimes)
  test(`accessToken, RFC 6749 §5.1 ${name} → kept for ${kept} s`, async () => {
    const { time, count } = timed(expires_in, takesSeconds);
    expect([await count(), await count()]).toEqual([1, 1]);
    time.ms += kept * 1000 - 1;
    expect(await count()).toBe(1);
    time.ms += 1;
    expect([await count(), await count()]).toEqual([2, 2]);
  });

for (const [expires_in, then] of [[3600, [1, 1]] as const, [undefined, [2, 3]] as const])
  test(`accessToken, RFC 6749 §5.1 many callers, expires_in ${expires_in} → one request`, async () => {
    const { tokens, seen, count } = timed(expires_in);
    const all = await Promise.all(Array.from({ length: 50 }, () => tokens.accessToken()));
    expect(new Set(all.map(({ access_token }) => access_token))).toEqual(new Set(["token-1"]));
    expect(seen()).toEqual([discovery, "POST /token"]);
    // Without expires_in a token is used once.
    expect([await count(), await count()]).toEqual([...then]);
  });

for (const kind of ["metadata", "token"] as const)
  test(`accessToken, an error of the ${kind} request → to all who wait, and not kept`, async () => {
    const reply: Reply = ({ nth, origin }) =>
      nth === 1 ? plain("", 503) : token(nth, validMetadata(origin));
    const { tokens, of } = play({ [kind]: reply });
    const waiting = Array.from({ length: 20 }, () => messageOf(tokens.accessToken()));
    const [message = "", ...others] = new Set(await Promise.all(waiting));
    expect([others, of(kind).length]).toEqual([[], 1]);
    expect(message).toContain("503");
    await tokens.accessToken();
    expect(of(kind)).toHaveLength(2);
  });

// --- Calling the API -----------------------------------------------------------------------------

const trace = { "x-trace": "7" };
const put = { method: "PUT", body: "text" };
const posted = (url: string) => new Request(url, { method: "POST", headers: trace, body: "text" });
const withBasic = { ...put, headers: { ...trace, authorization: "Basic eDp5" } };
const asList: RequestInit = { ...put, headers: [["x-trace", "7"]] };
const asHeaders = { ...put, headers: new Headers({ ...trace, Authorization: "Bearer other" }) };
const patch = { method: "PATCH", headers: { "x-trace": "8" }, body: "other" };

type Call = (api: string) => [input: string | URL | Request, init?: RequestInit];
const sent: [name: string, call: Call, seen: string][] = [
  ["a URL as text", (api) => [`${api}?page=2`], "GET /identity?page=2"],
  ["a URL", (api) => [new URL(api)], "GET /identity"],
  ["header fields as members", (api) => [api, withBasic], "PUT /identity 7 text"],
  ["header fields as a list", (api) => [api, asList], "PUT /identity 7 text"],
  ["header fields as Headers", (api) => [api, asHeaders], "PUT /identity 7 text"],
  ["a Request", (api) => [posted(api)], "POST /identity 7 text"],
  ["a Request, and what comes before it", (api) => [posted(api), patch], "PATCH /identity 8 other"],
];

for (const [name, call, seen] of sent)
  test(`fetch, RFC 6750 §2.1 ${name} → the token in the field, all else as given`, async () => {
    const { tokens, api, of } = play({ api: () => plain("body", 201, { "x-more": "1" }) });
    const answer = await tokens.fetch(...call(api));
    expect([answer.status, answer.headers.get("x-more")]).toEqual([201, "1"]);
    expect(await answer.text()).toBe("body");
    const { method, target, headers, body } = of("api")[0]!;
    const all = [method, target, headers.get("x-trace"), body].filter((part) => part);
    expect([all.join(" "), headers.get("authorization")]).toEqual([seen, "Bearer token-1"]);
    expect(headers.get("dpop")).toBeNull();
  });

const foreign: Record<string, (own: string) => string> = {
  "another server": () => other,
  "another host name": (own) => own.replace("127.0.0.1", "localhost"),
  "another scheme": (own) => own.replace("http", "https"),
  "a port that it begins with": (own) => own.slice(0, -1),
  "another server, it as the user": (own) => other.replace("//", `//${own.slice(7)}@`),
};

for (const [name, url] of Object.entries(foreign))
  test(`fetch, RFC 6750 §5.3 ${name} → an error, nothing is sent`, async () => {
    const { tokens, origin, requests } = play();
    const target = `${url(origin)}/identity`;
    expect(await messageOf(tokens.fetch(target))).toContain(origin);
    expect(await messageOf(tokens.fetch(new Request(target)))).toContain(origin);
    expect([requests, stranger.requests]).toEqual([[], []]);
  });

test("fetch, an answer of 3 MiB in gzip → unpacked, as fetch does", async () => {
  const { tokens, api } = play({ api: () => zipped(new Uint8Array(3 * megabyte)) });
  expect(await (await tokens.fetch(api)).bytes()).toHaveLength(3 * megabyte);
});

test("fetch, an answer that never ends → its start is there", async () => {
  const start = new TextEncoder().encode("start");
  const endless = new ReadableStream({ start: (controller) => controller.enqueue(start) });
  const { tokens, api } = play({ api: () => new Response(endless) });
  const reader = (await tokens.fetch(api)).body!.getReader();
  expect((await reader.read()).value).toEqual(start);
});

test("fetch, the caller's signal → ends the call, with the caller's reason", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  const waiting: Reply = () => {
    controller.abort(new Error("the caller's own"));
    return new Promise(() => {});
  };
  const { tokens, api } = play({ api: waiting });
  expect(await messageOf(tokens.fetch(api, { signal }))).toBe("the caller's own");
  expect(await messageOf(tokens.fetch(new Request(api, { signal })))).toBe("the caller's own");
});

// --- 401 invalid_token ---------------------------------------------------------------------------

const isFirst = ({ headers }: Received) => headers.get("authorization")!.endsWith("-1");
const expired = () => challenge('Bearer error="invalid_token", realm="x"');
const rejecting: Reply = (received) => (isFirst(received) ? expired() : plain("yes"));

const bytes = new TextEncoder().encode("again=1");
const formData = new FormData();
formData.set("again", "1");
const form = new URLSearchParams("again=1");
const bodies = [undefined, "again=1", bytes, bytes.buffer, formData, form, new Blob(["again=1"])];

for (const body of bodies)
  test(`fetch, RFC 6750 §3.1 invalid_token, body ${body?.constructor.name} → once more`, async () => {
    const { tokens, api, of } = play({ api: rejecting });
    const method = body === undefined ? "GET" : "POST";
    const init = { method, headers: { "x-trace": "7" }, ...(body !== undefined && { body }) };
    expect((await tokens.fetch(api, init)).status).toBe(200);
    const seen = of("api").map(({ method, headers, body: sent }) => [
      ...[method, headers.get("x-trace"), headers.get("authorization"), sent.includes("again")],
    ]);
    const expected = [1, 2].map((nth) => [method, "7", `Bearer token-${nth}`, method === "POST"]);
    expect(seen).toEqual(expected);
    expect((await tokens.fetch(new Request(api))).status).toBe(200);
    expect(of("token")).toHaveLength(2);
  });

async function* generated() {
  yield "once=1";
}
const once: Record<string, Call> = {
  "a stream": (api) => [api, { method: "POST", body: new Response("once=1").body! }],
  "a generator": (api) => [api, { method: "POST", body: generated() as never }],
  "a Request with a body": (api) => [new Request(api, { method: "POST", body: "once=1" })],
};

for (const [name, input] of Object.entries(once))
  test(`fetch, RFC 6750 §3.1 invalid_token, ${name}, which is read once → the 401`, async () => {
    const { tokens, api, of } = play({ api: rejecting });
    const answer = await tokens.fetch(...input(api));
    expect([answer.status, await answer.text()]).toEqual([401, "no"]);
    expect(of("api").map(({ body }) => body)).toEqual(["once=1"]);
    expect((await tokens.fetch(...input(api))).status).toBe(200); // with a new token
  });

/** How many calls and token requests there are after one `fetch`. */
const returned: [name: string, api: Reply, status: number, calls: number, tokens: number][] = [
  ["401 without an error", () => challenge("Bearer"), 401, 1, 1],
  ["401 without a challenge", () => plain("", 401), 401, 1, 1],
  ["401 invalid_request", () => challenge('Bearer error="invalid_request"'), 401, 1, 1],
  ["401 invalid_dpop_proof", () => challenge('DPoP error="invalid_dpop_proof"'), 401, 1, 1],
  ["401 text alone", () => challenge('Bearer error_description="invalid_token"'), 401, 1, 1],
  ["200 invalid_token", () => challenge('Bearer error="invalid_token"', 200), 200, 1, 1],
  ["400 invalid_token", () => challenge('Bearer error="invalid_token"', 400), 400, 1, 1],
  ["403 invalid_token", () => challenge('Bearer error="invalid_token"', 403), 403, 1, 1],
  ["401 invalid_token, the new token too", expired, 401, 2, 2],
  ["401 invalid_token as a token", () => challenge("Bearer a=b, Error = invalid_token"), 401, 2, 2],
];
for (const status of redirects)
  returned.push([`redirect ${status}`, () => plain("", status, { location }), status, 1, 1]);

for (const [name, reply, status, calls, requests] of returned)
  test(`fetch, RFC 6750 §3.1 ${name} → returned`, async () => {
    const { tokens, api, of } = play({ api: reply });
    expect((await tokens.fetch(api, { redirect: "follow" })).status).toBe(status);
    expect([of("api").length, of("token").length]).toEqual([calls, requests]);
    expect(stranger.requests).toEqual([]);
  });

test("fetch, RFC 6750 §3.1 invalid_token with a body that does not end → given up", async () => {
  const given = Promise.withResolvers<void>();
  const pull = (controller: ReadableStreamDefaultController) => controller.enqueue("x");
  const endless = () => new ReadableStream({ pull, cancel: () => given.resolve() });
  const headers = { "www-authenticate": 'Bearer error="invalid_token"' };
  const reply: Reply = ({ nth }) =>
    nth > 1 ? plain("yes") : new Response(endless(), { status: 401, headers });
  const { tokens, api } = play({ api: reply });
  expect(await (await tokens.fetch(api)).text()).toBe("yes");
  await given.promise;
});

test("fetch, RFC 6750 §3.1 no new token to be had → the error of the token request", async () => {
  const once: Reply = ({ nth }) => (nth > 1 ? plain("", 503) : token(nth));
  const { tokens, api, of } = play({ token: once, api: rejecting });
  expect(await messageOf(tokens.fetch(api))).toContain("/token: 503");
  expect(of("api")).toHaveLength(1);
});

test("fetch, RFC 6750 §3.1 many calls at once, one that comes late → one renewal", async () => {
  const all = Promise.withResolvers<void>();
  const renewed = Promise.withResolvers<void>();
  const { tokens, origin, of, api } = play({
    api: async (received) => {
      if (received.nth === 20) all.resolve();
      await all.promise;
      if (received.target === "/late" && isFirst(received)) await renewed.promise;
      return await rejecting(received);
    },
  });
  const late = tokens.fetch(`${origin}/late`);
  const answers = await Promise.all(Array.from({ length: 19 }, () => tokens.fetch(api)));
  renewed.resolve();
  expect([...answers, await late].map(({ status }) => status)).toEqual(Array(20).fill(200));
  expect([of("api").length, of("token").length]).toEqual([40, 2]);
});

// --- Proof of possession -------------------------------------------------------------------------

describe("DPOP=1", () => {
  const jtis = new Set<unknown>();
  /** The claims of a proof that is as RFC 9449 §4.2 has it, and the thumbprint of its key. */
  async function proven({ headers }: Received) {
    const proof = headers.get("dpop") ?? "";
    const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK);
    const { jwk = {}, ...header } = protectedHeader;
    expect(header).toEqual({ alg: "ES256", typ: "dpop+jwt" });
    expect(Object.keys(jwk).sort()).toEqual(["crv", "kty", "x", "y"]);
    const { iat, jti, ...claims } = payload;
    expect(iat).toBeWithin(secondsNow() - 60, secondsNow() + 1);
    expect(jti).toMatch(/^.{16,}$/);
    expect(jtis).not.toContain(jti);
    jtis.add(jti);
    return { claims, jkt: await jose.calculateJwkThumbprint(jwk as jose.JWK) };
  }
  const claimsOf = async (received: Received[]) =>
    (await Promise.all(received.map(proven))).map(({ claims }) => claims);
  const noncesOf = async (received: Received[]) =>
    (await claimsOf(received)).map(({ nonce }) => nonce);
  const ath = (token: string) => new Bun.CryptoHasher("sha256").update(token).digest("base64url");
  const playBound = (parts: Parts = {}) => play({ ...parts, client: { dpop: true } });
  const boundToken = (nth: number) => token(nth, { token_type: "DPoP", expires_in: 3600 });

  test("RFC 9449 §5, RFC 9449 §7.1 → one key; ath with the token; a new proof each time", async () => {
    const { tokens, origin, requests, of } = playBound({ api: rejecting, metadata: withQuery });
    await tokens.fetch(`${origin}/a/b%20c/?page=2&x=/a#top?`, { method: "post" });
    expect(requests[0]!.headers.get("dpop")).toBeNull();
    const proofs = await Promise.all([...of("token"), ...of("api")].map(proven));
    const htu = `${origin}/a/b%20c/`;
    expect(proofs.map(({ claims }) => claims)).toEqual([
      { htm: "POST", htu: `${origin}/token` },
      { htm: "POST", htu: `${origin}/token` },
      { htm: "POST", htu, ath: ath("token-1") },
      { htm: "POST", htu, ath: ath("token-2") },
    ]);
    const another = playBound();
    await another.tokens.accessToken();
    const { jkt } = await proven(another.of("token")[0]!);
    expect(new Set(proofs.map((proof) => proof.jkt)).size).toBe(1);
    expect(proofs[0]!.jkt).not.toBe(jkt);
    expect(of("api")[1]!.headers.get("authorization")).toBe("DPoP token-2");
  });

  test("RFC 9449 §4.2 → htm is the method", async () => {
    const { tokens, api, of } = playBound();
    for (const method of ["GET", "DELETE", "patch"]) await tokens.fetch(api, { method });
    await tokens.fetch(new Request(api, { method: "PUT" }));
    const methods = (await claimsOf(of("api"))).map(({ htm }) => htm);
    expect(methods).toEqual(["GET", "DELETE", "PATCH", "PUT"]);
  });

  const askForNonce = (nonce: string) =>
    Response.json({ error: "use_dpop_nonce" }, { status: 400, headers: { "dpop-nonce": nonce } });

  test("RFC 9449 §8 the issuer's nonce → once more; remembered, each new one taken", async () => {
    const { tokens, of } = playBound({
      token: ({ nth }) => {
        if (nth === 1) return askForNonce("nonce-1");
        // RFC 9449 §8.2: an answer that brings none leaves the one there is.
        const more = nth === 3 ? {} : { headers: { "dpop-nonce": `nonce-${nth}` } };
        return Response.json({ access_token: `t${nth}`, token_type: "DPoP" }, more);
      },
    });
    for (let times = 0; times < 4; times++) await tokens.accessToken();
    const expected = [undefined, "nonce-1", "nonce-2", "nonce-2", "nonce-4"];
    expect(await noncesOf(of("token"))).toEqual(expected);
  });

  test("RFC 9449 §9 the API's nonce → once more with the same token; each origin its own", async () => {
    const { origin, of } = playBound({
      token: ({ nth }) =>
        Response.json(boundToken(nth), { headers: { "dpop-nonce": "of the issuer" } }),
      api: ({ nth }) => {
        const error = nth === 1 ? 'DPoP error="use_dpop_nonce", algs="ES256"' : 'DPoP algs="ES256"';
        const headers = { "www-authenticate": error, "dpop-nonce": `of the API ${nth}` };
        return plain("", nth === 1 ? 401 : 200, headers);
      },
    });
    // The same server under another name: another origin.
    const resource = origin.replace("127.0.0.1", "localhost");
    const away = tokenSource(origin, { resource, dpop: true });
    for (let times = 0; times < 2; times++)
      expect((await away.fetch(`${resource}/identity`)).status).toBe(200);
    expect(await noncesOf(of("token"))).toEqual([undefined]);
    expect(await noncesOf(of("api"))).toEqual([undefined, "of the API 1", "of the API 2"]);
  });

  test("RFC 9449 §8, RFC 9449 §9 a nonce never right, a body that is read once → the refusal", async () => {
    const issuer = playBound({ token: () => askForNonce("nonce") });
    expect(await messageOf(issuer.tokens.accessToken())).toContain("400 use_dpop_nonce");
    expect(issuer.of("token")).toHaveLength(2);
    const headers = { "www-authenticate": 'DPoP error="use_dpop_nonce"', "dpop-nonce": "nonce" };
    const { tokens, api, of } = playBound({ api: () => plain("", 401, headers) });
    expect((await tokens.fetch(api)).status).toBe(401);
    expect([of("api").length, of("token").length]).toEqual([2, 1]);
    const body = new Response("once").body!;
    expect((await tokens.fetch(api, { method: "POST", body })).status).toBe(401);
    expect(of("api")).toHaveLength(3);
  });
});

// --- The program ---------------------------------------------------------------------------------

describe("bun run client.ts", () => {
  const header = { alg: "ES256", typ: "at+jwt" };
  const claims = { sub: "client", note: "caf\u00e9\u202e" };
  const encoded = [header, claims].map((part) => Buffer.from(JSON.stringify(part)));
  const jwt = `${encoded.map((part) => part.toString("base64url")).join(".")}.c2ln`;
  const response = { access_token: jwt, token_type: "Bearer", expires_in: 60 };
  const answer = [{ type: "note", value: "\u007f\u0085\u2028" }];
  const valid: Parts = {
    token: () => response,
    api: ({ target }) => (target === "/identity" ? answer : plain("elsewhere", 404)),
  };
  // The API's URL may end in a slash, as the issuer's may.
  const secret = { CLIENT_SECRET: client_secret };
  const environment = (url: string) => ({ ISSUER: url, API_URL: `${url}/`, ...secret });
  const started = (parts: Parts = {}, more = {}) => {
    const { origin, seen } = play({ ...valid, ...parts });
    const program = launch("client", { env: { ...environment(origin), ...more } });
    return { program, origin, seen };
  };
  /** The one line that it ends with. */
  const failure = async (program: ReturnType<typeof launch>) => {
    const code = await program.ended();
    const line = program.stderr.trimEnd().split("\n").at(-1) ?? "";
    expect([code, program.stderr.match(/^error: /gm)?.length]).toEqual([1, 1]);
    expect(line).toMatch(/^error: [ -~]+ \(.+\)$/);
    expect(program.stderr + program.stdout).not.toMatch(/correct.horse|    at /);
    return line;
  };

  test("all is well → JSON on stdout, two lines on stderr, exit code 0", async () => {
    const { program, origin, seen } = started({}, { CLIENT_ID: "me", SCOPE: "api1" });
    expect(await program.ended()).toBe(0);
    expect(program.stdout).toMatch(/^[ -~\n]+$/);
    const documents = program.stdout.trim().split(/(?<=^[}\]])\n/m);
    const expected = [response, { header, claims }, answer];
    expect(documents.map((text) => JSON.parse(text))).toEqual(expected);
    const [first, second, ...rest] = program.stderr.trimEnd().split("\n");
    expect(first).toContain("me");
    expect(first).toContain(origin);
    expect(second).toContain(`${origin}/identity`);
    expect([rest, seen()]).toEqual([[], [discovery, "POST /token", "GET /identity"]]);
  });

  test("RFC 6749 §1.4 an opaque token → used, and it is said why it is not shown", async () => {
    const { program } = started({ token: () => token(1) });
    expect(await program.ended()).toBe(0);
    expect(program.stderr).toContain("opaque");
    expect(program.stdout).toContain('"value"');
  });

  const insufficient = () => challenge('Bearer error="insufficient_scope"', 403);
  const failing: [name: string, said: RegExp, parts: Parts][] = [
    ["RFC 6749 §5.2 401", /401 invalid_client.*SECRET/, { token: code("invalid_client", 401) }],
    ["RFC 6750 §3.1 403", /identity: 403 insufficient_scope.*SCOPE/, { api: insufficient }],
    ["RFC 9110 §15.4 a redirect", /identity: 302/, { api: () => plain("", 302, { location }) }],
    ["no JSON", /identity: 200 .*JSON/, { api: () => plain("\u001b[2J") }],
    ["control", /identity: 401 \\u009b2J/, { api: () => challenge('Bearer error="\u009b2J"') }],
  ];

  for (const [name, said, parts] of failing)
    test(`${name} → one line, exit code 1`, async () =>
      expect(await failure(started(parts).program)).toMatch(said));

  test("--wait → waits until both servers take connections, and asks them without a secret", async () => {
    const port = freePort();
    const url = `http://127.0.0.1:${port}`;
    const program = launch("client", { env: environment(url), arguments: ["--wait"] });
    // It gets no answer for a while. If it starts later than that, the test proves less.
    await Bun.sleep(300);
    const seen: string[] = [];
    const fetch = ({ url: target, method, headers }: Request) => {
      const scheme = headers.get("authorization")?.split(" ")[0] ?? "";
      seen.push(`${method} ${target.slice(url.length)} ${scheme}`);
      return Response.json(token(1, { ...validMetadata(url), expires_in: 9 }));
    };
    Bun.serve({ hostname: "127.0.0.1", port, fetch });
    expect(await program.ended()).toBe(0);
    const last = [`${discovery} `, "POST /token Basic", "GET /identity Bearer"];
    expect(seen).toEqual(["GET / ", "GET / ", ...last]);
  });

  test("--wait, an issuer that hangs up → one line", async () => {
    const open = (socket: Bun.Socket) => void socket.end();
    const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { open, data() {} } });
    const env = { ISSUER: `http://127.0.0.1:${listener.port}`, API_URL: play().origin };
    const program = launch("client", { env, arguments: ["--wait"] });
    expect(await failure(program)).toMatch(/Discovery .*ISSUER/);
  });

  test("an untrusted certificate → one line that says what to do; trusted by TLS_CERT", async () => {
    const pem = join(directory, "localhost.pem");
    const request = "req -x509 -nodes -days 1 -newkey ec -pkeyopt ec_paramgen_curve:P-256";
    const names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost";
    const made = `${request} ${names} -keyout ${pem} -out ${pem}`;
    Bun.spawnSync(["openssl", ...made.split(" ")]);
    const tls = { cert: Bun.file(pem), key: Bun.file(pem) };
    const fetch = () => Response.json(token(1, validMetadata(url)));
    const server = Bun.serve({ hostname: "localhost", port: 0, tls, fetch });
    const url: string = `https://localhost:${server.port}`;
    const env = environment(url);
    expect(await failure(launch("client", { env }))).toMatch(/CERT.*\(.*(TLS_CERT).*\)$/);
    const trusting = launch("client", { env: { ...env, TLS_CERT: pem } });
    expect(await trusting.ended()).toBe(0);
  });
});
