/** The client: what it sends, what it takes, how long it keeps a token, and what it says if it fails. */

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import type { ClientSettings } from "../../config.ts";
import { assertionType, key, secondsNow } from "../support/jwt.ts";
import { launch, temporaryDirectory } from "../support/programs.ts";
import { reservePort, tokenSource } from "../support/servers.ts";

interface Received {
  kind: "metadata" | "token" | "api";
  method: string;
  target: string;
  headers: Headers;
  body: string;
}

/** An answer, or the members of one, to the request that is the nth of its kind. */
type Reply = (received: Received, nth: number, origin: string) => unknown;
type Parts = { [kind in Received["kind"]]?: Reply } & { client?: Partial<ClientSettings> };

const client_secret = "correct+horse%battery";
const servers: Bun.Server<undefined>[] = [];
afterAll(() => servers.forEach((server) => void server.stop(true)));

/** A server that plays the issuer and the API, and a client of both. */
function play({ client, ...replies }: Parts = {}) {
  const requests: Received[] = [];
  const of = (kind: Received["kind"]) => requests.filter((received) => received.kind === kind);
  const token_type = client?.dpop ? "DPoP" : "Bearer";
  const valid: Required<Omit<Parts, "client">> = {
    metadata: () => metadata,
    token: (_, nth) => ({ access_token: `token-${nth}`, token_type, expires_in: 3600 }),
    api: () => new Response("yes"),
  };
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch(request) {
      const { method, headers, url } = request;
      const { pathname, search } = new URL(url);
      const isToken = method === "POST" && pathname === "/token";
      const kind = isToken ? "token" : pathname.startsWith("/.well-known") ? "metadata" : "api";
      const body = await request.text();
      requests.push({ kind, method, target: pathname + search, headers, body });
      const reply = replies[kind] ?? valid[kind];
      const answer = await reply(requests.at(-1)!, of(kind).length, origin);
      return answer instanceof Response ? answer : Response.json(answer);
    },
  });
  servers.push(server);
  const origin = `http://127.0.0.1:${server.port}`;
  const metadata = { issuer: origin, token_endpoint: `${origin}/token` };
  const tokens = tokenSource(origin, { resource: origin, client_secret, ...client });
  const seen = () => requests.map(({ method, target }) => `${method} ${target}`);
  return { origin, tokens, requests, of, seen, api: `${origin}/identity` };
}

const discovery = "GET /.well-known/openid-configuration";
const plain = (text: string, status = 200, headers = {}) => new Response(text, { status, headers });
const padded = (members: object, bytes: number) =>
  plain(JSON.stringify(members) + " ".repeat(bytes - JSON.stringify(members).length));
const zipped = (members: object) =>
  plain(Bun.gzipSync(JSON.stringify(members)) as never, 200, { "content-encoding": "gzip" });
const challenge = (value: string, status = 401) =>
  plain("no", status, { "www-authenticate": value });
const withQuery: Reply = (_, _nth, own) => ({ issuer: own, token_endpoint: `${own}/token?a=1` });
const token = (nth: number, more: object = { expires_in: 3600 }) => ({
  ...{ access_token: `token-${nth}`, token_type: "Bearer" },
  ...more,
});
const megabyte = 1_048_576;

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

// --- Discovery -----------------------------------------------------------------------------------

describe("discovery", () => {
  const works = (name: string, metadata?: Reply) =>
    test(`${name} → a token`, async () => {
      const { tokens, seen, requests } = play(metadata && { metadata });
      expect(await tokens.accessToken()).toMatchObject({ access_token: "token-1" });
      expect(seen()).toEqual([discovery, "POST /token"]);
      expect(requests[0]!.headers.get("authorization")).toBeNull();
    });
  const valid = (issuer: string) => ({ issuer, token_endpoint: `${issuer}/token` });
  works("RFC 8414 §3.2 valid metadata");
  works("RFC 8414 §3.2 metadata of 1 MiB", (_, _nth, own) => padded(valid(own), megabyte));
  works("RFC 8414 §3.2 unknown metadata", (_, _nth, own) => ({ ...valid(own), x: [1] }));
  works("RFC 8259 §11 another content type", (_, _nth, own) => plain(JSON.stringify(valid(own))));

  const refuses = (name: string, says: string, metadata: (own: string, other: string) => unknown) =>
    test(`${name} → no token request`, async () => {
      const other = play();
      const reply: Reply = (_, _nth, own) => metadata(own, other.origin);
      const { tokens, seen, origin } = play({ metadata: reply });
      const message = await messageOf(tokens.accessToken());
      expect(message).toContain(`${origin}/.well-known/openid-configuration`);
      expect(message).toContain(` ${says.replace("OWN", origin)}`);
      expect(message).toMatch(/ \(.+\)$/);
      expect([seen(), other.requests]).toEqual([[discovery], []]);
    });
  const changed = (name: string, says: string, change: (own: string, other: string) => object) =>
    refuses(name, says, (own, other) => ({ ...valid(own), ...change(own, other) }));
  changed("RFC 8414 §3.3 another issuer", "issuer", (_, issuer) => ({ issuer }));
  changed("RFC 8414 §3.3 issuer with a slash", '"OWN/"', (own) => ({ issuer: `${own}/` }));
  changed("RFC 8414 §3.3 issuer in a list", '["OWN"]', (own) => ({ issuer: [own] }));
  changed("RFC 8414 §3.3 no issuer", "issuer", () => ({ issuer: undefined }));
  const endpoints: Record<string, (own: string, other: string) => unknown> = {
    "at another server": (_, other) => `${other}/token`,
    "at another server, the issuer as user": (own, other) =>
      `http://${own.slice(7)}@${other.slice(7)}`,
    "at a host that begins like it": (own) => `${own}.other.example/token`,
    "at a port that begins like it": (own) => `${own}1/token`,
    "of another scheme": (own) => own.replace("http", "ftp"),
    "that is relative": () => "/token",
    ...{ "that is missing": () => undefined, "that is null": () => null },
    "that is a list": (own) => [`${own}/token`],
  };
  for (const [name, endpoint] of Object.entries(endpoints))
    changed(`RFC 8414 §2 token_endpoint ${name}`, "token_endpoint", (own, other) => ({
      token_endpoint: endpoint(own, other),
    }));
  for (const text of ["null", "[]", "7", "<html>", ""])
    refuses(`RFC 8414 §3.2 metadata '${text}'`, "", () => plain(text));
  refuses("RFC 8414 §3.2 metadata in gzip", "", (own) => zipped(valid(own)));
  for (const status of [201, 301, 302, 303, 307, 308, 404, 500])
    refuses(`RFC 8414 §3.2 status ${status}`, `${status}`, (own, other) =>
      Response.json(valid(own), { status, headers: { location: other } }),
    );
  refuses("RFC 8414 §3.2 status 204", "204", () => new Response(null, { status: 204 }));
  refuses("RFC 8414 §3.2 over 1 MiB", "", (own) => padded(valid(own), megabyte + 1));

  test("an issuer or an API of http beyond loopback → refused, nothing is sent", async () => {
    const { origin, requests } = play();
    const far = origin.replace("127.0.0.1", "0.0.0.0");
    const issuer = tokenSource(far, { resource: origin });
    expect(await messageOf(issuer.fetch(`${origin}/identity`))).toStartWith("ISSUER ");
    const resource = tokenSource(origin, { resource: far });
    expect(await messageOf(resource.fetch(`${far}/identity`))).toStartWith("API_URL ");
    expect(requests).toEqual([]);
  });
});

// --- The token request ---------------------------------------------------------------------------

describe("the token request", () => {
  test("RFC 6749 §4.4.2 the parameters in the body, Basic in the header", async () => {
    const { tokens, of } = play({ client: { scope: "api1 read" } });
    await tokens.accessToken();
    const [{ method, headers, body } = {} as Received] = of("token");
    expect([method, body]).toEqual(["POST", "grant_type=client_credentials&scope=api1+read"]);
    expect(headers.get("content-type")).toStartWith("application/x-www-form-urlencoded");
    expect(headers.get("dpop")).toBeNull();
  });

  const pairs = ["a:b|c:d:", "a+b|c+d", "a%b|100%25", "a&b=c/d|e&f=g/h?#", `a"b'c\\d|"'\\(!*~)`];
  for (const pair of [...pairs, "a b| c ", "cli\u00ebnt|\u20ac\u{1f511}", "a\tb|c\n\r\u007f"])
    test(`RFC 6749 Appendix B ${JSON.stringify(pair)} is form-encoded`, async () => {
      const [id = "", secret = ""] = pair.split("|");
      const { tokens, of } = play({ client: { client_id: id, client_secret: secret } });
      await tokens.accessToken();
      const field = of("token")[0]!.headers.get("authorization")!;
      const halves = atob(field.replace(/^Basic /, "")).split(":");
      expect(halves.join("")).toMatch(/^[!-~]+$/);
      // As a form decodes it, which is what the other side does.
      const decoded = halves.map((half) => new URLSearchParams(`x=${half}`).get("x"));
      expect(decoded).toEqual([id, secret]);
    });

  test("RFC 6749 §3.2 a token_endpoint with a query is used as it is", async () => {
    const { tokens, seen } = play({ metadata: withQuery });
    await tokens.accessToken();
    expect(seen()).toEqual([discovery, "POST /token?a=1"]);
  });

  for (const status of [301, 302, 303, 307, 308])
    test(`RFC 9700 §4.12 redirect ${status} → the secret goes nowhere`, async () => {
      const other = play();
      const headers = { location: `${other.origin}/token` };
      const { tokens, seen } = play({ token: () => plain("", status, headers) });
      expect(await messageOf(tokens.accessToken())).toContain(`${status}`);
      expect([seen().length, other.requests]).toEqual([2, []]);
    });
});

describe("private_key_jwt", () => {
  const directory = temporaryDirectory();
  const file = (name: string, content: unknown) => {
    const text = typeof content === "string" ? content : JSON.stringify(content);
    writeFileSync(join(directory, name), text);
    return join(directory, name);
  };

  for (const alg of ["ES256", "RS256", "PS256", "Ed25519", "ML-DSA-44"])
    for (const kid of alg === "ES256" ? ["one", undefined] : ["one"])
      test(`RFC 7523 §3 an assertion, ${alg}, kid ${kid}`, async () => {
        const { privateJwk, publicJwk } = await key(alg);
        const keyFile = file(`${alg}.jwk`, { ...privateJwk, kid });
        const client = { keyFile, client_id: "signer" };
        const { origin, tokens, of } = play({ token: () => token(1, {}), client });
        const before = secondsNow();
        await tokens.accessToken();
        await tokens.accessToken();
        const jtis = new Set<unknown>();
        for (const { headers, body } of of("token")) {
          expect(headers.get("authorization")).toBeNull();
          const { client_assertion = "", ...rest } = Object.fromEntries(new URLSearchParams(body));
          const grant = { grant_type: "client_credentials", scope: "api1" };
          expect(rest).toEqual({ ...grant, client_assertion_type: assertionType });
          const verified = await jose.jwtVerify(client_assertion, publicJwk);
          const typ = "client-authentication+jwt";
          expect(verified.protectedHeader).toEqual({ alg, typ, ...(kid && { kid }) });
          const { jti, iat = 0, ...claims } = verified.payload;
          // RFC 7523bis: the issuer, as a string.
          const ids = { iss: "signer", sub: "signer", aud: origin };
          expect(claims).toEqual({ ...ids, exp: iat + 60 });
          expect(iat).toBeWithin(before, secondsNow() + 1);
          expect(jti).toMatch(/^.{16,}$/);
          jtis.add(jti);
        }
        expect(jtis.size).toBe(2);
      });

  test("CLIENT_KEY that is no private JWK with its alg → one line, no token request", async () => {
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
});

// --- The token response --------------------------------------------------------------------------

describe("the token response", () => {
  const valid = { access_token: "token-1", token_type: "Bearer", expires_in: 3600 };
  const takes = (name: string, change: object, dpop = false) =>
    test(`${name} → taken as it is`, async () => {
      const response = { ...valid, ...change };
      const { tokens, api, of } = play({ token: () => response, client: { dpop } });
      expect(await tokens.accessToken()).toEqual(response);
      await tokens.fetch(api);
      const field = `${response.token_type} ${response.access_token}`;
      expect(of("api")[0]!.headers.get("authorization")).toBe(field);
    });
  takes("RFC 6749 §5.1 a valid one", {});
  takes("RFC 6749 §5.1 token_type bearer", { token_type: "bearer" });
  takes("RFC 6749 §5.1 token_type BEARER", { token_type: "BEARER" });
  takes("RFC 9449 §5 a bound token", { token_type: "DPoP" }, true);
  takes("RFC 9449 §5 token_type dpop", { token_type: "dpop" }, true);
  takes("RFC 6750 §2.1 all characters", { access_token: "aZ09-._~+/==" });
  takes("RFC 6749 §5.1 unknown members", { refresh_token: "x", scope: "api1 api2" });
  takes("RFC 6749 §5.1 no expires_in", { expires_in: undefined });
  takes("RFC 6749 §5.1 expires_in 1", { expires_in: 1 });

  const discards = (section: string, member: string, values: unknown[], dpop = false) => {
    for (const value of values)
      test(`${section} ${member} ${JSON.stringify(value)} → discarded`, async () => {
        const token_type = dpop ? "DPoP" : "Bearer";
        const response = { ...valid, token_type, [member]: value };
        const { tokens, api, of } = play({ token: () => response, client: { dpop } });
        const message = await messageOf(tokens.fetch(api));
        expect(message).toContain("/token: ");
        expect(message).toMatch(new RegExp(`: ${member}\\b`));
        if (member !== "access_token" && value !== undefined)
          expect(message).toContain(JSON.stringify(value));
        expect(message).toMatch(/ \(.+\)$/);
        expect(of("api")).toEqual([]);
      });
  };
  discards("RFC 6749 §5.1", "access_token", [undefined, null, "", 12345, ["token-1"]]);
  const malformed = ["token-1 x", "token-1\r\nx: y", "token-1=x", "=", "token-\u00e9"];
  discards("RFC 6750 §2.1", "access_token", malformed);
  discards("RFC 6749 §7.1", "token_type", [undefined, null, "", "mac", "Bearer x", "DPoP"]);
  discards("RFC 6749 §7.1", "token_type", [7, ["Bearer"], { Bearer: 1 }]);
  discards("RFC 9449 §5", "token_type", ["Bearer", undefined], true);
  discards("RFC 6749 §5.1", "expires_in", [0, -1, null, "soon", "3600", {}, [60], true]);

  const refuses = (name: string, says: string, token: Reply) =>
    test(`RFC 6749 §5.1 ${name} → an error`, async () => {
      const { tokens, origin } = play({ token });
      const message = await messageOf(tokens.accessToken());
      expect(message).toContain(`${origin}/token: ${says}`);
      if (!says) expect(message).toMatch(/\/token: [^(]*[a-z]{3,} .*\(.+\)$/);
    });
  refuses("status 201", "201", () => Response.json(valid, { status: 201 }));
  refuses("status 500", "500", () => Response.json(valid, { status: 500 }));
  refuses("a form", "", () => plain("access_token=token-1&token_type=Bearer"));
  refuses("JSON null", "", () => plain("null"));
  refuses("gzip", "", () => zipped(valid));
  refuses("over 1 MiB", "", () => padded(valid, megabyte + 1));
});

// --- Keeping a token -----------------------------------------------------------------------------

describe("accessToken", () => {
  /** A client with a clock of its own; `count` asks for a token and says how many there were. */
  function timed(expires_in: unknown, more: Parts = {}) {
    const time = { ms: Date.UTC(2030, 0, 1) };
    const client = { clock: () => time.ms } as object;
    const played = play({ token: (_, nth) => token(nth, { expires_in }), ...more, client });
    const count = async () => {
      await played.tokens.accessToken();
      return played.of("token").length;
    };
    return { ...played, time, count };
  }

  const lifetimes = { 3600: 3540, 121: 61, 120: 60, 119: 59.5, 60: 30, 1: 0.5 };
  for (const [expires_in, kept] of Object.entries(lifetimes))
    test(`RFC 6749 §5.1 expires_in ${expires_in} → kept for ${kept} s`, async () => {
      const { time, count } = timed(Number(expires_in));
      expect([await count(), await count()]).toEqual([1, 1]);
      time.ms += kept * 1000 - 1;
      expect(await count()).toBe(1);
      time.ms += 1;
      expect([await count(), await count()]).toEqual([2, 2]);
    });

  test("RFC 6749 §5.1 the lifetime counts from before the request", async () => {
    const { time, count } = timed(3600, {
      token: (_, nth) => {
        time.ms += 100_000;
        return token(nth);
      },
    });
    expect(await count()).toBe(1);
    time.ms += 3_439_999;
    expect(await count()).toBe(1);
    time.ms += 1;
    expect(await count()).toBe(2);
  });

  test("RFC 6749 §5.1 without expires_in a token is used once", async () => {
    const { count } = timed(undefined);
    expect([await count(), await count(), await count()]).toEqual([1, 2, 3]);
  });

  for (const expires_in of [3600, undefined])
    test(`many callers at once, expires_in ${expires_in} → one request`, async () => {
      const { tokens, seen } = timed(expires_in);
      const all = await Promise.all(Array.from({ length: 50 }, () => tokens.accessToken()));
      expect(new Set(all.map(({ access_token }) => access_token))).toEqual(new Set(["token-1"]));
      expect(seen()).toEqual([discovery, "POST /token"]);
    });

  for (const kind of ["metadata", "token"] as const)
    test(`an error of the ${kind} request goes to all who wait, and is not kept`, async () => {
      const reply: Reply = (_, nth, issuer) =>
        nth === 1 ? plain("", 503) : token(nth, { issuer, token_endpoint: `${issuer}/token` });
      const { tokens, of } = play({ [kind]: reply });
      const waiting = Array.from({ length: 20 }, () => messageOf(tokens.accessToken()));
      const [message = "", ...others] = new Set(await Promise.all(waiting));
      expect([others, of(kind).length]).toEqual([[], 1]);
      expect(message).toContain("503");
      await tokens.accessToken();
      expect(of(kind)).toHaveLength(2);
    });
});

// --- Calling the API -----------------------------------------------------------------------------

describe("fetch", () => {
  test("RFC 6750 §2.1 the token in the field, all else as given", async () => {
    const { tokens, origin, of } = play({ api: () => plain("body", 201, { "x-more": "1" }) });
    const inits: Bun.HeadersInit[] = [
      { "x-trace": "7", authorization: "Basic eDp5" },
      [["x-trace", "7"]],
      new Headers({ "x-trace": "7", Authorization: "Bearer other" }),
    ];
    for (const headers of inits) {
      const target = `${origin}/orders?page=2`;
      const answer = await tokens.fetch(target, { method: "PUT", body: "text", headers });
      expect([answer.status, answer.headers.get("x-more")]).toEqual([201, "1"]);
      expect(await answer.text()).toBe("body");
      const { method, target: seen, headers: sent, body } = of("api").at(-1)!;
      expect([method, seen, body]).toEqual(["PUT", "/orders?page=2", "text"]);
      expect([sent.get("x-trace"), sent.get("authorization")]).toEqual(["7", "Bearer token-1"]);
    }
    await tokens.fetch(new URL(`${origin}/orders`));
    expect([of("api").at(-1)!.method, of("token").length]).toEqual(["GET", 1]);
  });

  test("a Request counts as fetch takes it; what init has comes first", async () => {
    const { tokens, api, of } = play();
    const headers = { "x-trace": "7" };
    const request = () => new Request(api, { method: "POST", headers, body: "text" });
    await tokens.fetch(request());
    await tokens.fetch(request(), { method: "PATCH", headers: { "x-trace": "8" }, body: "other" });
    const seen = of("api").map(({ method, headers, body }) => [
      ...[method, headers.get("x-trace"), body, headers.get("authorization")],
    ]);
    expect(seen).toEqual([
      ["POST", "7", "text", "Bearer token-1"],
      ["PATCH", "8", "other", "Bearer token-1"],
    ]);
    const controller = new AbortController();
    controller.abort(new Error("the caller's own"));
    const aborted = tokens.fetch(new Request(api, { signal: controller.signal }));
    expect(await messageOf(aborted)).toBe("the caller's own");
  });

  const foreign: Record<string, (own: string, other: string) => string> = {
    "another server": (_, other) => other,
    "another host name": (own) => own.replace("127.0.0.1", "localhost"),
    "another scheme": (own) => own.replace("http", "https"),
    "a port that it begins with": (own) => own.slice(0, -1),
    "another server, it as the user": (own, other) => other.replace("//", `//${own.slice(7)}@`),
  };
  for (const [name, url] of Object.entries(foreign))
    test(`RFC 6750 §5.2 ${name} → an error, nothing is sent`, async () => {
      const [own, other] = [play(), play()];
      const target = `${url(own.origin, other.origin)}/identity`;
      expect(await messageOf(own.tokens.fetch(target))).toContain(own.origin);
      expect(await messageOf(own.tokens.fetch(new Request(target)))).toContain(own.origin);
      expect([own.requests, other.requests]).toEqual([[], []]);
    });

  for (const status of [301, 302, 303, 307, 308])
    test(`redirect ${status} → returned, not followed`, async () => {
      const other = play();
      const location = `${other.origin}/identity`;
      const { tokens, api, of } = play({ api: () => plain("", status, { location }) });
      const answer = await tokens.fetch(api, { redirect: "follow" });
      expect([answer.status, answer.headers.get("location")]).toEqual([status, location]);
      expect([of("api").length, other.requests]).toEqual([1, []]);
    });

  test("an answer of 3 MiB in gzip is unpacked, as fetch does", async () => {
    const body = Bun.gzipSync(Buffer.alloc(3 * megabyte));
    const headers = { "content-encoding": "gzip" };
    const { tokens, api } = play({ api: () => new Response(body, { headers }) });
    expect(await (await tokens.fetch(api)).bytes()).toHaveLength(3 * megabyte);
  });

  test("an answer streams: its start is there before its end", async () => {
    const { promise: held, resolve: release } = Promise.withResolvers<void>();
    async function* body() {
      yield "start";
      await held;
      yield "end";
    }
    const { tokens, api } = play({ api: () => new Response(body as never) });
    const decoder = new TextDecoder();
    let text = "";
    for await (const chunk of (await tokens.fetch(api)).body!) {
      text += decoder.decode(chunk);
      if (text === "start") release();
    }
    expect(text).toBe("startend");
  });

  test("the caller's signal ends the call, with the caller's reason", async () => {
    const controller = new AbortController();
    const api = () => {
      controller.abort(new Error("the caller's own"));
      return new Promise(() => {});
    };
    const { tokens, api: url } = play({ api });
    const { signal } = controller;
    expect(await messageOf(tokens.fetch(url, { signal }))).toBe("the caller's own");
  });

  // --- 401 invalid_token

  const isFirst = ({ headers }: Received) => headers.get("authorization")!.endsWith("-1");
  const rejecting: Reply = (received) =>
    isFirst(received) ? challenge('Bearer error="invalid_token", realm="x"') : plain("yes");
  const bytes = new TextEncoder().encode("again=1");
  const formData = new FormData();
  formData.set("again", "1");
  const form = new URLSearchParams("again=1");
  const bodies = [undefined, "again=1", bytes, bytes.buffer, formData, form, new Blob(["again=1"])];
  for (const body of bodies)
    test(`RFC 6750 §3.1 invalid_token, ${body?.constructor.name} → once more, new token`, async () => {
      const { tokens, api, of } = play({ api: rejecting });
      const headers = { "x-trace": "7" };
      const init = body === undefined ? { headers } : { method: "POST", headers, body };
      expect((await tokens.fetch(api, init)).status).toBe(200);
      const seen = of("api").map(({ method, headers, body: sent }) => [
        ...[method, headers.get("x-trace"), headers.get("authorization"), sent.includes("again")],
      ]);
      const method = body === undefined ? "GET" : "POST";
      const expected = [1, 2].map((nth) => [method, "7", `Bearer token-${nth}`, method === "POST"]);
      expect(seen).toEqual(expected);
      await tokens.fetch(api);
      expect(of("token")).toHaveLength(2);
    });

  async function* generated() {
    yield "once=1";
  }
  const once: Record<string, (api: string) => [string | Request, RequestInit?]> = {
    "a stream": (api) => [api, { method: "POST", body: new Response("once=1").body! }],
    "a generator": (api) => [api, { method: "POST", body: generated() as never }],
    "a Request with a body": (api) => [new Request(api, { method: "POST", body: "once=1" })],
  };
  for (const [name, input] of Object.entries(once))
    test(`RFC 6750 §3.1 invalid_token, ${name}, which is read once → the 401`, async () => {
      const { tokens, api, of } = play({ api: rejecting });
      const answer = await tokens.fetch(...input(api));
      expect([answer.status, await answer.text()]).toEqual([401, "no"]);
      expect(of("api").map(({ body }) => body)).toEqual(["once=1"]);
    });

  test("RFC 6750 §3.1 invalid_token, a Request without a body → once more", async () => {
    const { tokens, api } = play({ api: rejecting });
    expect((await tokens.fetch(new Request(api))).status).toBe(200);
  });

  const others = ["Bearer", 'Bearer error="invalid_request"', 'DPoP error="invalid_dpop_proof"'];
  for (const value of [...others, 'Bearer error_description="invalid_token"', ""])
    test(`RFC 6750 §3.1 401 with '${value}' → returned`, async () => {
      const { tokens, api, of } = play({ api: () => (value ? challenge(value) : plain("", 401)) });
      expect((await tokens.fetch(api)).status).toBe(401);
      await tokens.fetch(api);
      expect([of("api").length, of("token").length]).toEqual([2, 1]);
    });
  for (const status of [200, 400, 403])
    test(`RFC 6750 §3.1 ${status} with invalid_token → returned`, async () => {
      const reply = () => challenge('Bearer error="invalid_token"', status);
      const { tokens, api, of } = play({ api: reply });
      expect((await tokens.fetch(api)).status).toBe(status);
      expect([of("api").length, of("token").length]).toEqual([1, 1]);
    });

  test("RFC 6750 §3.1 the new token is refused too → the second 401", async () => {
    const { tokens, api, of } = play({ api: () => challenge('Bearer error="invalid_token"') });
    expect((await tokens.fetch(api)).status).toBe(401);
    expect([of("api").length, of("token").length]).toEqual([2, 2]);
  });

  test("RFC 6750 §3.1 no new token to be had → the error of the token request", async () => {
    const once: Reply = (_, nth) => (nth > 1 ? plain("", 503) : token(nth));
    const { tokens, api, of } = play({ token: once, api: rejecting });
    expect(await messageOf(tokens.fetch(api))).toContain("/token: 503");
    expect(of("api")).toHaveLength(1);
  });

  test("RFC 6750 §3.1 many calls at once, one that comes late → one renewal", async () => {
    const all = Promise.withResolvers<void>();
    const renewed = Promise.withResolvers<void>();
    const { tokens, origin, of } = play({
      api: async (received, nth) => {
        if (nth === 20) all.resolve();
        await all.promise;
        if (received.target === "/late" && isFirst(received)) await renewed.promise;
        return await rejecting(received, nth, "");
      },
    });
    const late = tokens.fetch(`${origin}/late`);
    const calls = Array.from({ length: 19 }, () => tokens.fetch(`${origin}/identity`));
    const answers = await Promise.all(calls);
    renewed.resolve();
    expect([...answers, await late].map(({ status }) => status)).toEqual(Array(20).fill(200));
    expect([of("api").length, of("token").length]).toEqual([40, 2]);
  });
});

// --- Proof of possession -------------------------------------------------------------------------

describe("DPoP", () => {
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
  const ath = (token: string) => new Bun.CryptoHasher("sha256").update(token).digest("base64url");
  const bound = (parts: Parts = {}) => play({ ...parts, client: { dpop: true, ...parts.client } });

  test("RFC 9449 §5, §7.1 one key; ath with the token; a new proof each time", async () => {
    const { tokens, origin, requests, of } = bound({
      api: (received) => (isOld(received) ? challenge('DPoP error="invalid_token"') : plain("yes")),
    });
    const isOld = ({ headers }: Received) => headers.get("authorization") === "DPoP token-1";
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
    const another = bound();
    await another.tokens.accessToken();
    const { jkt } = await proven(another.of("token")[0]!);
    expect(new Set(proofs.map((proof) => proof.jkt)).size).toBe(1);
    expect(proofs[0]!.jkt).not.toBe(jkt);
    expect(of("api")[1]!.headers.get("authorization")).toBe("DPoP token-2");
  });

  test("RFC 9449 §4.2 htu without the query of the token_endpoint", async () => {
    const { tokens, origin, of } = bound({ metadata: withQuery });
    await tokens.accessToken();
    expect((await proven(of("token")[0]!)).claims["htu"]).toBe(`${origin}/token`);
  });

  test("RFC 9449 §4.2 htm is the method, without DPOP no proof", async () => {
    const { tokens, api, of } = bound();
    for (const method of ["GET", "DELETE", "patch"]) await tokens.fetch(api, { method });
    await tokens.fetch(new Request(api, { method: "PUT" }));
    const proofs = await Promise.all(of("api").map(proven));
    const methods = ["GET", "DELETE", "PATCH", "PUT"];
    expect(proofs.map(({ claims }) => claims["htm"])).toEqual(methods);
    const unbound = play();
    await unbound.tokens.fetch(unbound.api);
    for (const { headers } of unbound.requests) expect(headers.get("dpop")).toBeNull();
  });

  const nonces = async (received: Received[]) =>
    (await Promise.all(received.map(proven))).map(({ claims }) => claims["nonce"]);

  test("RFC 9449 §8 the issuer's nonce: asked again once, remembered, each new one taken", async () => {
    const { tokens, of } = bound({
      token: (_, nth) => {
        const headers = { "dpop-nonce": `nonce-${nth}` };
        const error = { error: "use_dpop_nonce" };
        if (nth === 1) return Response.json(error, { status: 400, headers });
        // RFC 9449 §8.2: an answer that brings none leaves the one there is.
        const more = nth === 3 ? {} : { headers };
        return Response.json({ access_token: `t${nth}`, token_type: "DPoP" }, more);
      },
    });
    for (let times = 0; times < 4; times++) await tokens.accessToken();
    const expected = [undefined, "nonce-1", "nonce-2", "nonce-2", "nonce-4"];
    expect(await nonces(of("token"))).toEqual(expected);
  });

  test("RFC 9449 §8 a nonce that is never right → two requests, an error", async () => {
    const headers = { "dpop-nonce": "nonce" };
    const error = { error: "use_dpop_nonce" };
    const { tokens, of } = bound({ token: () => Response.json(error, { status: 400, headers }) });
    expect(await messageOf(tokens.accessToken())).toContain("400 use_dpop_nonce");
    expect(of("token")).toHaveLength(2);
  });

  test("RFC 9449 §9 the API's nonce: once more with the same token; each origin its own", async () => {
    const { origin, of } = bound({
      token: (_, nth) => {
        const members = { access_token: `token-${nth}`, token_type: "DPoP", expires_in: 3600 };
        return Response.json(members, { headers: { "dpop-nonce": "of the issuer" } });
      },
      api: (_, nth) => {
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
    expect(await nonces(of("token"))).toEqual([undefined]);
    expect(await nonces(of("api"))).toEqual([undefined, "of the API 1", "of the API 2"]);
  });

  test("RFC 9449 §9 a nonce that is never right, or a body that is read once → the 401", async () => {
    const headers = { "www-authenticate": 'DPoP error="use_dpop_nonce"', "dpop-nonce": "nonce" };
    const { tokens, api, of } = bound({ api: () => plain("", 401, headers) });
    expect((await tokens.fetch(api)).status).toBe(401);
    expect([of("api").length, of("token").length]).toEqual([2, 1]);
    const body = new Response("once").body!;
    expect((await tokens.fetch(api, { method: "POST", body })).status).toBe(401);
    expect(of("api")).toHaveLength(3);
  });
});

// --- Messages ------------------------------------------------------------------------------------

describe("what is said about a failure", () => {
  const says = (name: string, expected: string | RegExp, token: Reply, client = {}) =>
    test(name, async () => {
      const { tokens, origin, of } = play({ token, client });
      const message = await messageOf(tokens.accessToken());
      expect(message).toContain(`${origin}/token: `);
      if (typeof expected === "string") expect(message).toContain(`/token: ${expected} (`);
      else expect(message).toMatch(expected);
      expect(of("token")).toHaveLength(1);
    });
  const json = (members: unknown, status = 400) => {
    return () => Response.json(members, { status });
  };
  const described = (error_description: unknown, error = "x") => json({ error, error_description });
  says("RFC 6749 §5.2 code and description", "400 x No such thing.", described("No such thing."));
  says("RFC 6749 §5.2 a code alone", "400 any_code", json({ error: "any_code" }));
  says("RFC 6749 §5.2 no JSON", "502", () => plain("<h1>Bad Gateway</h1>", 502));
  says("RFC 6749 §5.2 JSON null", "503", () => plain("null", 503));
  says("RFC 6749 §5.2 no text as members", "400", json({ error: 7, error_description: ["x"] }));
  says("RFC 6750 §3 the code in the challenge", "401 invalid_client", () =>
    challenge('Basic realm="x", error="invalid_client"'),
  );
  says("a challenge without a code", "401", () => challenge('Basic realm="x"'));
  const control = "a\u0000b\tc\r\nd\u001b[2Je\u007f";
  const escaped = "a\\u0000b\\u0009c\\u000d\\u000ad\\u001b[2Je\\u007f";
  says("control characters are escaped", `400 x ${escaped}`, described(control));
  const wide = "\\u00e9\\u0085\\u202e\\u2028\\ud83d\\udd11";
  const wideText = "\u00e9\u0085\u202e\u2028\u{1f511}";
  says("what is not ASCII is escaped", `400 x ${wide}`, described(wideText));
  says("200 characters are kept", `400 x ${"y".repeat(194)}`, described("y".repeat(194)));
  says("more are cut", `400 x ${"y".repeat(194)}`, described(`${"y".repeat(194)}NO`));

  const hints = (name: string, hint: RegExp, token: Reply, client = {}) =>
    says(`${name} → a hint`, new RegExp(`\\(.*(${hint.source}).*\\)$`), token, client);
  hints("invalid_client", /CLIENT_SECRET/, json({ error: "invalid_client" }, 401));
  hints("invalid_scope", /SCOPE/, json({ error: "invalid_scope" }));
  hints("insufficient_scope", /SCOPE/, json({ error: "insufficient_scope" }, 403));
  hints("invalid_dpop_proof", /DPOP=1/, json({ error: "invalid_dpop_proof" }));
  hints("with DPoP", /clock/, json({ error: "invalid_dpop_proof" }), { dpop: true });
  hints("another code", /ISSUER/, described("not invalid_client", "invalid_request"));
  hints("token_type", /DPOP/, () => ({ access_token: "token-1", token_type: "mac" }));

  test("an address of the issuer is escaped and cut too", async () => {
    const path = `/\u001b[2J\u202e${"y".repeat(200)}NO`;
    const { tokens, origin } = play({
      metadata: (_, _nth, issuer) => ({ issuer, token_endpoint: issuer + path }),
      api: () => plain("", 500),
    });
    const message = await messageOf(tokens.accessToken());
    expect(message).toContain(` ${`${origin}/\\u001b[2J\\u202e`.padEnd(200, "y")}: 500`);
  });

  test("nobody listens → what to start; hints about proxies are for other hosts", async () => {
    const { port, release } = reservePort();
    release();
    const proxyVariable = "HTTPS_PROXY";
    const near = tokenSource(`http://127.0.0.1:${port}`, { proxyVariable });
    expect(await messageOf(near.accessToken())).toMatch(/ECONNREFUSED.*\(.*bun start.*\)$/);
    const away = tokenSource("https://issuer.invalid", { proxyVariable });
    expect(await messageOf(away.accessToken())).toMatch(/\(.*(HTTPS_PROXY).*\)$/);
    const unproxied = tokenSource("https://issuer.invalid", { proxyVariable: undefined });
    expect(await messageOf(unproxied.accessToken())).not.toContain("HTTPS_PROXY");
  });
});

// --- The program ---------------------------------------------------------------------------------

describe("bun run client.ts", () => {
  const header = { alg: "ES256", typ: "at+jwt" };
  const claims = { sub: "client", note: "caf\u00e9\u202e" };
  const encoded = [header, claims].map((part) => Buffer.from(JSON.stringify(part)));
  const jwt = `${encoded.map((part) => part.toString("base64url")).join(".")}.c2ln`;
  const answer = [{ type: "note", value: "\u007f\u0085\u2028" }];
  const valid: Parts = {
    token: () => ({ access_token: jwt, token_type: "Bearer", expires_in: 60 }),
    api: ({ target }) => (target === "/identity" ? answer : plain("elsewhere", 404)),
  };
  const started = (parts: Parts, env = {}, options = {}) => {
    const { origin, seen } = play({ ...valid, ...parts });
    const urls = { ISSUER: origin, API_URL: origin, CLIENT_SECRET: client_secret };
    const program = launch("client", { env: { ...urls, ...env }, ...options });
    return { program, origin, seen };
  };
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
    const response = { access_token: jwt, token_type: "Bearer", expires_in: 60 };
    const expected = [response, { header, claims }, answer];
    expect(documents.map((text) => JSON.parse(text))).toEqual(expected);
    const [first, second, ...rest] = program.stderr.trimEnd().split("\n");
    expect(first).toContain("me");
    expect(first).toContain(origin);
    expect(second).toContain(`${origin}/identity`);
    expect([rest, seen()]).toEqual([[], [discovery, "POST /token", "GET /identity"]]);
  });

  test("RFC 6749 §1.4 an opaque token is used, and it is said why it is not shown", async () => {
    const { program } = started({ token: () => token(1) });
    expect(await program.ended()).toBe(0);
    expect(program.stderr).toContain("opaque");
    expect(program.stdout).toContain('"value"');
  });

  const fails = (name: string, says: RegExp, parts: Parts) =>
    test(`${name} → one line, exit code 1`, async () =>
      expect(await failure(started(parts).program)).toMatch(says));
  const refused = () => Response.json({ error: "invalid_client" }, { status: 401 });
  fails("RFC 6749 §5.2 a refusal", /401 invalid_client.*CLIENT_SECRET/, { token: refused });
  const insufficient = () => challenge('Bearer error="insufficient_scope"', 403);
  fails("RFC 6750 §3.1 403", /identity: 403 insufficient_scope.*SCOPE/, { api: insufficient });
  fails("a redirect", /identity: 302/, { api: () => plain("", 302, { location: "/other" }) });
  fails("no JSON", /identity: 200/, { api: () => plain("\u001b[2J") });
  const control = () => challenge('Bearer error="\u009b2J"');
  fails("control characters", /identity: 401 \\u009b2J/, { api: control });

  test("--wait waits until both servers take connections, and asks them without a secret", async () => {
    const issuer = reservePort();
    issuer.release();
    const url = `http://127.0.0.1:${issuer.port}`;
    const program = launch("client", { env: { ISSUER: url, API_URL: url }, arguments: ["--wait"] });
    // It gets no answer for a while. If it starts later than that, the test proves less.
    await Bun.sleep(300);
    const seen: string[] = [];
    const fetch = ({ url: target, method, headers }: Request) => {
      const scheme = headers.get("authorization")?.split(" ")[0] ?? "";
      seen.push(`${method} ${target.slice(url.length)} ${scheme}`);
      return Response.json(
        token(1, { issuer: url, token_endpoint: `${url}/token`, expires_in: 9 }),
      );
    };
    servers.push(Bun.serve({ hostname: "127.0.0.1", port: issuer.port, fetch }));
    expect(await program.ended()).toBe(0);
    const last = [`${discovery} `, "POST /token Basic", "GET /identity Bearer"];
    expect(seen).toEqual(["GET / ", "GET / ", ...last]);
  });

  test("--wait does not wait for an issuer that hangs up → one line", async () => {
    const open = (socket: Bun.Socket) => void socket.end();
    const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { open, data() {} } });
    const env = { ISSUER: `http://127.0.0.1:${listener.port}`, API_URL: play().origin };
    const program = launch("client", { env, arguments: ["--wait"] });
    expect(await failure(program)).toMatch(/Discovery .*ISSUER/);
    listener.stop(true);
  });

  test("an untrusted certificate → one line that says what to do; trusted by TLS_CERT", async () => {
    const directory = temporaryDirectory();
    const [cert, keyFile] = [join(directory, "cert.pem"), join(directory, "key.pem")];
    const request = "req -x509 -nodes -days 1 -newkey ec -pkeyopt ec_paramgen_curve:P-256";
    const names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost";
    const files = `-keyout ${keyFile} -out ${cert}`;
    Bun.spawnSync(["openssl", ...`${request} ${names} ${files}`.split(" ")]);
    const server: Bun.Server<undefined> = Bun.serve({
      hostname: "localhost",
      port: 0,
      tls: { cert: Bun.file(cert), key: Bun.file(keyFile) },
      fetch: () => Response.json(token(1, { issuer: url, token_endpoint: `${url}/token` })),
    });
    servers.push(server);
    const url = `https://localhost:${server.port}`;
    const env = { ISSUER: url, API_URL: url };
    expect(await failure(launch("client", { env }))).toMatch(/CERT.*\(.*(TLS_CERT).*\)$/);
    const trusting = launch("client", { env: { ...env, TLS_CERT: cert } });
    expect(await trusting.ended()).toBe(0);
  });
});
