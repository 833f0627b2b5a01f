/**
 * The client (RFC 6749 §4.4) against issuers and APIs that do whatever a test tells them: what it
 * sends, what it believes, when it renews, and what it says when something fails.
 */

import { afterAll, afterEach, describe, expect, setSystemTime, spyOn, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import {
  captureLog,
  type Changes,
  cleanUp,
  eventually,
  freePort,
  launch,
  temporaryDirectory,
  thumbprint,
  withModule,
} from "./support.ts";

type Client = typeof import("../client.ts");
type Idp = typeof import("../idp.ts");
type Api = typeof import("../api.ts");

// --- Issuers and APIs ----------------------------------------------------------------------------

interface Received {
  method: string;
  /** Path and query. */
  target: string;
  headers: Headers;
  body: string;
}

type Answer = Response | Promise<Response>;

const stops: (() => unknown)[] = [];

afterEach(() => void setSystemTime());
afterAll(async () => {
  await Promise.all(stops.map((stop) => stop()));
  await cleanUp();
});

/** A server of the test's own. `answer` gets each request and how many there were so far. */
function serve(answer: (received: Received, count: number) => Answer, options: object = {}) {
  const received: Received[] = [];
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    development: false,
    ...options,
    fetch: async (request) => {
      const { pathname, search } = new URL(request.url);
      const { method } = request;
      const headers = new Headers(request.headers);
      const body = await request.text();
      const entry = { method, target: pathname + search, headers, body };
      return await answer(entry, received.push(entry));
    },
  });
  stops.push(() => server.stop(true));
  return { origin: server.url.origin, received };
}

const closedOrigin = () => `http://127.0.0.1:${freePort()}`;

/** A port that takes connections and hangs up at once. */
function hangUp(): string {
  const socket = { open: (opened: Bun.Socket) => void opened.end(), data: () => {} };
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket });
  stops.push(() => listener.stop(true));
  return `http://127.0.0.1:${listener.port}`;
}

const noAnswer = () => new Promise<Response>(() => {});

/** An answer that begins and then stalls. */
const stalled = () =>
  new Response(new ReadableStream({ start: (controller) => controller.enqueue("{") }));

const text = (body: Bun.BodyInit, status = 200, headers = {}) =>
  new Response(body, { status, headers });

/** A string that JSON is padded to with spaces. */
const padded = (value: unknown, bytes: number) => text(JSON.stringify(value).padEnd(bytes));

/** Compressed, which the client neither asks for nor unpacks. */
const packed = (value: unknown) =>
  text(Bun.gzipSync(JSON.stringify(value)), 200, { "content-encoding": "gzip" });

const client_secret = "what-only-the-client-knows";
const discovery = "/.well-known/openid-configuration";

interface Scenario {
  /** The metadata; `issuer` is the server's origin. */
  metadata?: (issuer: string) => Answer;
  /** The answer to a token request, of which there were `count` so far. */
  token?: (count: number, received: Received) => Answer;
  /** The answer to a call of the API, of which there were `count` so far. */
  api?: (received: Received, count: number) => Answer;
  client?: Changes["client"];
}

const validMetadata = (issuer: string) => ({ issuer, token_endpoint: `${issuer}/connect/token` });

const validToken = (count: number) => ({
  access_token: `access-token-${count}`,
  token_type: "Bearer",
  expires_in: 3600,
});

/** A client with an issuer and an API, which do what is right but for what the scenario says. */
async function scenario(deviation: Scenario = {}) {
  let count = 0;
  const metadata = deviation.metadata ?? ((issuer) => Response.json(validMetadata(issuer)));
  const token = deviation.token ?? (() => Response.json(validToken(count)));
  const issuer = serve((received) =>
    received.method === "GET" ? metadata(issuer.origin) : token((count += 1), received),
  );
  const api = serve(deviation.api ?? (() => Response.json([])));
  const changes = {
    issuer: issuer.origin,
    resource: api.origin,
    client_secret,
    ...deviation.client,
  };
  const client = await withModule("client", { client: changes }, async (loaded: Client) => loaded);
  const tokenRequests = () => issuer.received.filter(({ method }) => method === "POST");
  const tokenEndpoint = `${issuer.origin}/connect/token`;
  const identity = `${api.origin}/identity`;
  return {
    client,
    issuer: issuer.origin,
    resource: api.origin,
    tokenEndpoint,
    identity,
    requests: issuer.received,
    tokenRequests,
    calls: api.received,
  };
}

/** The message of the error: always one printable line without a secret or a token in it. */
async function messageOf(failing: Promise<unknown>): Promise<string> {
  const error = await failing.then(
    (value) => new Error(`nothing failed: ${JSON.stringify(value)}`),
    (reason) => reason,
  );
  expect(error).toBeInstanceOf(Error);
  const { message } = error as Error;
  expect(message).toMatch(/^[ -~]+$/);
  expect(message).not.toContain(client_secret);
  expect(message).not.toContain("access-token-");
  return message;
}

/** What to try where nothing better is known. */
const checkAll = "Check ISSUER and API_URL, and the log of the server.";

/** What is said of a failure, with what to try. */
const failure = (what: string, where: string, why: string, hint = checkAll) =>
  `${what} failed at ${where}: ${why} (${hint})`;

/** Runs with what is printed collected, the documents on stdout and the lines on stderr. */
async function printed(run: () => Promise<unknown>) {
  const log = spyOn(console, "log").mockImplementation(() => {});
  const error = spyOn(console, "error").mockImplementation(() => {});
  try {
    await run();
    return { stdout: log.mock.calls.map(String), stderr: error.mock.calls.map(String) };
  } finally {
    log.mockRestore();
    error.mockRestore();
  }
}

// --- Discovery -----------------------------------------------------------------------------------

const limit = 1_048_576;
const tooLong = `the answer is longer than ${limit} bytes`;
const notOurs = "this is not the metadata of ISSUER";
const timedOut = "The operation timed out.";
const startAll = "Is it running? `bun start` starts everything.";

describe("discovery", () => {
  type Row = [name: string, metadata: (issuer: string, other: string) => Answer];
  const accepted: Row[] = [
    ["RFC 8414 §3.2 valid metadata", (issuer) => Response.json(validMetadata(issuer))],
    ["metadata of 1 MiB", (issuer) => padded(validMetadata(issuer), limit)],
    [
      "members that are not known here",
      (issuer) => Response.json({ ...validMetadata(issuer), mtls: [1] }),
    ],
    [
      "another content type",
      (issuer) => text(JSON.stringify(validMetadata(issuer)), 200, { "content-type": "text/html" }),
    ],
  ];
  const metadata = (change: (issuer: string, other: string) => object) =>
    ((issuer, other) =>
      Response.json({ ...validMetadata(issuer), ...change(issuer, other) })) satisfies Row[1];

  test.each(accepted)("%s → a token", async (_, answer) => {
    const { client, requests } = await scenario({ metadata: (issuer) => answer(issuer, "") });
    expect(await client.accessToken()).toEqual(validToken(1));
    const seen = requests.map(({ method, target }) => `${method} ${target}`);
    expect(seen).toEqual([`GET ${discovery}`, "POST /connect/token"]);
    expect(requests[0]!.body).toBe("");
    expect(requests[0]!.headers.get("authorization")).toBeNull();
    for (const { headers } of requests) expect(headers.get("accept-encoding")).toBeNull();
  });

  const refused: [...Row, why: string][] = [
    ["RFC 8414 §3.3 another issuer", metadata((_, other) => ({ issuer: other })), notOurs],
    ["RFC 8414 §3.3 issuer with a slash", metadata((own) => ({ issuer: `${own}/` })), notOurs],
    [
      "RFC 8414 §3.3 issuer in capitals",
      metadata((own) => ({ issuer: own.toUpperCase() })),
      notOurs,
    ],
    ["RFC 8414 §3.3 issuer in a list", metadata((own) => ({ issuer: [own] })), notOurs],
    ["no issuer", metadata(() => ({ issuer: undefined })), notOurs],
    ["no token_endpoint", metadata(() => ({ token_endpoint: undefined })), notOurs],
    ["token_endpoint null", metadata(() => ({ token_endpoint: null })), notOurs],
    [
      "token_endpoint at another server",
      metadata((_, other) => ({ token_endpoint: `${other}/connect/token` })),
      notOurs,
    ],
    [
      "token_endpoint at another server, the issuer as user name",
      metadata((own, other) => ({ token_endpoint: other.replace("//", `//${own.slice(7)}@`) })),
      notOurs,
    ],
    [
      "token_endpoint at a host that begins like the issuer",
      metadata((own) => ({ token_endpoint: `${own}.other.example/connect/token` })),
      notOurs,
    ],
    [
      "token_endpoint at a port that begins like the issuer's",
      metadata((own) => ({ token_endpoint: `${own}1/connect/token` })),
      notOurs,
    ],
    [
      "token_endpoint of another scheme",
      metadata((own) => ({ token_endpoint: `${own.replace("http", "ftp")}/connect/token` })),
      notOurs,
    ],
    ["token_endpoint relative", metadata(() => ({ token_endpoint: "/connect/token" })), notOurs],
    ["metadata null", () => text("null"), notOurs],
    ["metadata a list", () => text("[]"), notOurs],
    ["no JSON", () => text("<html>"), notOurs],
    ["nothing", () => text(""), notOurs],
    // It is not unpacked: a little may unpack to very much.
    ["metadata in gzip", (own) => packed(validMetadata(own)), notOurs],
    ["status 404", () => text("Not Found", 404), "404"],
    [
      "status 500, metadata valid",
      (own) => Response.json(validMetadata(own), { status: 500 }),
      "500",
    ],
    [
      "status 201, metadata valid",
      (own) => Response.json(validMetadata(own), { status: 201 }),
      "201",
    ],
    ["status 204", () => new Response(null, { status: 204 }), "204"],
    ...[301, 302, 303, 307, 308].map((status): [...Row, string] => [
      `redirect ${status}`,
      (_, other) => text("", status, { location: `${other}${discovery}` }),
      `${status}`,
    ]),
    ["metadata of 1 MiB and a byte", (own) => padded(validMetadata(own), limit + 1), tooLong],
    [
      "metadata without end",
      () => {
        const chunk = Buffer.alloc(65_536, " ");
        return text(new ReadableStream({ pull: (controller) => controller.enqueue(chunk) }));
      },
      tooLong,
    ],
  ];

  test.each(refused)("%s → one line, and no token request", async (_, answer, why) => {
    const other = serve(() => Response.json(validMetadata(other.origin)));
    const { client, issuer, requests } = await scenario({
      metadata: (issuer) => answer(issuer, other.origin),
    });
    expect(await messageOf(client.accessToken())).toBe(
      failure("Discovery", issuer + discovery, why.replace("ISSUER", issuer)),
    );
    expect(requests.map(({ method }) => method)).toEqual(["GET"]);
    expect(other.received).toEqual([]);
  });

  test("the issuer hangs up → one line", async () => {
    const issuer = hangUp();
    const { client } = await scenario({ client: { issuer } });
    expect(await messageOf(client.accessToken())).toBe(
      failure("Discovery", issuer + discovery, "ECONNRESET"),
    );
  });

  test("the issuer is not there → one line that says what to try", async () => {
    const issuer = closedOrigin();
    const { client } = await scenario({ client: { issuer } });
    expect(await messageOf(client.accessToken())).toBe(
      failure("Discovery", issuer + discovery, "ECONNREFUSED", startAll),
    );
  });

  // 0.0.0.0 reaches this machine, but is no loopback address.
  const origins: [string, (own: string) => string][] = [
    ["http beyond this machine", (own) => own.replace("127.0.0.1", "0.0.0.0")],
    ["a slash at the end", (own) => `${own}/`],
    ["a path", (own) => `${own}/tenant`],
    ["no URL", () => `localhost:${freePort()}`],
  ];
  const rule = "must be a bare https origin (http on loopback only), not";

  describe.each(origins)("an address with %s", (_, change) => {
    const ways = ["run", "accessToken", "apiFetch"] as const;

    test.each(ways)("as ISSUER, %s → one line, and nothing is sent", async (way) => {
      const server = serve(() => Response.json(validMetadata(issuer)));
      const issuer = change(server.origin);
      const { client, identity, calls } = await scenario({ client: { issuer } });
      const run = () => messageOf(client[way](identity));
      await printed(async () => expect(await run()).toBe(`ISSUER ${rule} ${issuer}`));
      expect(server.received).toEqual([]);
      expect(calls).toEqual([]);
    });

    test("as API_URL, run → one line, and nothing is sent", async () => {
      const server = serve(() => Response.json([]));
      const resource = change(server.origin);
      const { client, requests } = await scenario({ client: { resource } });
      await printed(async () =>
        expect(await messageOf(client.run())).toBe(`API_URL ${rule} ${resource}`),
      );
      expect(requests).toEqual([]);
      expect(server.received).toEqual([]);
    });

    test("as API_URL, apiFetch → an error, and no call", async () => {
      const server = serve(() => Response.json([]));
      const resource = change(server.origin);
      const { client } = await scenario({ client: { resource } });
      await messageOf(client.apiFetch(`${resource}/identity`));
      expect(server.received).toEqual([]);
    });
  });
});

describe("no answer", () => {
  /**
   * The limits that were asked for. From the one counted as `first` on each is 20 ms instead, for
   * no test should wait so long.
   */
  async function withShortLimits(first: number, run: () => Promise<void>): Promise<number[]> {
    const { timeout } = AbortSignal;
    const limits: number[] = [];
    const spy = spyOn(AbortSignal, "timeout").mockImplementation((milliseconds) =>
      timeout(limits.push(milliseconds) < first ? milliseconds : 20),
    );
    await run().finally(() => spy.mockRestore());
    return limits;
  }

  test.each([
    ["at all", noAnswer],
    ["to the end", stalled],
  ])("of the issuer %s in 10 s → one line", async (_, metadata) => {
    const { client, issuer } = await scenario({ metadata });
    const limits = await withShortLimits(1, async () =>
      expect(await messageOf(client.accessToken())).toBe(
        failure("Discovery", issuer + discovery, timedOut),
      ),
    );
    expect(limits).toEqual([10_000]);
  });

  test("of the token endpoint in 10 s → one line", async () => {
    const { client, tokenEndpoint } = await scenario({ token: noAnswer });
    const limits = await withShortLimits(2, async () =>
      expect(await messageOf(client.accessToken())).toBe(
        failure("The token request", tokenEndpoint, timedOut),
      ),
    );
    expect(limits).toEqual([10_000, 10_000]);
  });

  test("of the API in 10 s → one line, also with a signal of the caller", async () => {
    const { client, identity } = await scenario({ api: noAnswer });
    const { signal } = new AbortController();
    const limits = await withShortLimits(3, async () => {
      const message = failure("The call", identity, timedOut);
      expect(await messageOf(client.apiFetch(identity))).toBe(message);
      expect(await messageOf(client.apiFetch(identity, { signal }))).toBe(message);
    });
    expect(limits).toEqual([10_000, 10_000, 10_000, 10_000]);
  });
});

// --- The token request ---------------------------------------------------------------------------

describe("POST /connect/token as it arrives", () => {
  test("RFC 6749 §4.4.2 with a secret: the parameters in the body, Basic in the header", async () => {
    const { client, tokenRequests } = await scenario({ client: { scope: "api1 read" } });
    await client.accessToken();
    const [{ method, target, headers, body }] = tokenRequests() as [Received];
    expect(`${method} ${target}`).toBe("POST /connect/token");
    expect(body).toBe("grant_type=client_credentials&scope=api1+read");
    expect(headers.get("content-type")).toBe("application/x-www-form-urlencoded;charset=UTF-8");
    expect(headers.get("authorization")).toBe(`Basic ${btoa(`client:${client_secret}`)}`);
    expect(headers.get("dpop")).toBeNull();
  });

  const credentials: [name: string, client_id: string, client_secret: string][] = [
    ["a colon", "a:b", "c:d:"],
    ["a plus", "a+b", "c+d"],
    ["percent", "a%b", "100%25"],
    ["a space", "a b", " c "],
    ["&, = and a slash", "a&b=c/d", "e&f=g/h?#"],
    ["quotes and a backslash", `a"b'c\\d`, `"'\\(!*~)`],
    ["what is not ASCII", "cliënt", "gehéim €🔑"],
    ["control characters", "a\tb", "c\n\r\u007f"],
  ];

  test.each(credentials)(
    "RFC 6749 §2.3.1 id and secret with %s are form-encoded",
    async (_, client_id, client_secret) => {
      const { client, tokenRequests } = await scenario({ client: { client_id, client_secret } });
      await client.accessToken();
      const [{ headers, body }] = tokenRequests() as [Received];
      const basic = atob(headers.get("authorization")!.replace(/^Basic /, ""));
      expect(basic).toMatch(/^[!-~]+$/);
      // As a form decodes it, which is what the other side does.
      const decoded = basic
        .split(":")
        .map((half) => [...new URLSearchParams(`x=${half}`).values()]);
      expect(decoded).toEqual([[client_id], [client_secret]]);
      expect(body).toBe("grant_type=client_credentials&scope=api1");
    },
  );

  test("RFC 6749 §3.2 a token_endpoint with a query is used as it is", async () => {
    const { client, tokenRequests } = await scenario({
      metadata: (issuer) => Response.json({ issuer, token_endpoint: `${issuer}/token?tenant=1` }),
    });
    await client.accessToken();
    expect(tokenRequests().map(({ target }) => target)).toEqual(["/token?tenant=1"]);
  });

  const statuses = [301, 302, 303, 307, 308];

  test.each(statuses)("redirect %d → one line, and the secret goes nowhere", async (status) => {
    const other = serve(() => Response.json(validToken(1)));
    const { client, tokenEndpoint, tokenRequests } = await scenario({
      token: () => text("", status, { location: `${other.origin}/connect/token` }),
    });
    expect(await messageOf(client.accessToken())).toBe(
      failure("The token request", tokenEndpoint, `${status}`),
    );
    expect(tokenRequests()).toHaveLength(1);
    expect(other.received).toEqual([]);
  });

  test("redirect to itself → one request alone", async () => {
    const { client, tokenRequests } = await scenario({
      token: () => text("", 307, { location: "/connect/token" }),
    });
    await messageOf(client.accessToken());
    expect(tokenRequests()).toHaveLength(1);
  });
});

describe("private_key_jwt", () => {
  const directory = temporaryDirectory();
  const second = Math.floor(Date.now() / 1000);

  function fileWith(content: string): string {
    const file = join(directory, `${readdirSync(directory).length}.jwk`);
    writeFileSync(file, content);
    return file;
  }

  async function pair(alg: string) {
    const { privateKey, publicKey } = await jose.generateKeyPair(alg, { extractable: true });
    return { publicKey, jwk: { ...(await jose.exportJWK(privateKey)), alg } };
  }

  const kids: [alg: string, kid: string | undefined][] = [
    ["ES256", "one"],
    ["ES256", undefined],
    ["RS256", "two"],
    ["PS256", "three"],
    ["Ed25519", "four"],
    ["ML-DSA-44", "five"],
  ];

  test.each(kids)("RFC 7523 §3 %s, kid %s", async (alg, kid) => {
    const { publicKey, jwk } = await pair(alg);
    const keyFile = fileWith(JSON.stringify({ ...jwk, ...(kid && { kid }) }));
    const { client, issuer, tokenRequests } = await scenario({
      client: { keyFile, client_id: "signer" },
      token: () => Response.json({ access_token: "access-token-1", token_type: "Bearer" }),
    });
    setSystemTime(new Date(second * 1000 + 999));
    await client.accessToken();
    await client.accessToken();
    const jtis = [];
    for (const { headers, body, target } of tokenRequests()) {
      expect(target).toBe("/connect/token");
      expect(headers.get("authorization")).toBeNull();
      expect(headers.get("content-type")).toBe("application/x-www-form-urlencoded;charset=UTF-8");
      const { client_assertion = "", ...rest } = Object.fromEntries(new URLSearchParams(body));
      expect(rest).toEqual({
        grant_type: "client_credentials",
        scope: "api1",
        client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
      });
      const { payload, protectedHeader } = await jose.jwtVerify(client_assertion, publicKey);
      expect(protectedHeader).toEqual({ alg, ...(kid && { kid }) });
      const { jti, ...claims } = payload;
      const aud = issuer; // as one string: rfc7523bis
      const times = { iat: second, exp: second + 60 };
      expect(claims).toEqual({ iss: "signer", sub: "signer", aud, ...times });
      expect(jti).toMatch(/^.{16,}$/);
      jtis.push(jti);
      expect(body).not.toContain(client_secret);
    }
    expect(new Set(jtis).size).toBe(2);
  });

  test("a setting without a value counts as none", async () => {
    const { client, tokenRequests } = await scenario({ client: { keyFile: "" } });
    await client.accessToken();
    expect(tokenRequests()[0]!.headers.get("authorization")).toStartWith("Basic ");
  });

  const unusable: [name: string, content: () => Promise<string | undefined>][] = [
    ["names no file", async () => undefined],
    ["is empty", async () => ""],
    ["is no JSON", async () => `-----BEGIN PRIVATE KEY-----\n${client_secret}\n`],
    ["is null", async () => "null"],
    ["is a list", async () => "[]"],
    ["is no key", async () => `{"alg":"ES256"}`],
    [
      "has a public key",
      async () => {
        const { d, ...jwk } = (await pair("ES256")).jwk;
        return JSON.stringify(jwk);
      },
    ],
    [
      "has a key without alg",
      async () => JSON.stringify({ ...(await pair("ES256")).jwk, alg: undefined }),
    ],
    [
      "has a key for another alg",
      async () => JSON.stringify({ ...(await pair("ES256")).jwk, alg: "RS256" }),
    ],
    ["has alg none", async () => JSON.stringify({ ...(await pair("ES256")).jwk, alg: "none" })],
  ];

  test.each(unusable)("CLIENT_KEY %s → one line, and no token request", async (_, content) => {
    const written = await content();
    const keyFile = written === undefined ? join(directory, "missing") : fileWith(written);
    const { client, tokenRequests } = await scenario({ client: { keyFile } });
    expect(await messageOf(client.accessToken())).toBe(
      `CLIENT_KEY must name a file with a private JWK and its alg, not ${keyFile}`,
    );
    expect(tokenRequests()).toEqual([]);
  });
});

// --- The token response --------------------------------------------------------------------------

describe("the token response", () => {
  type Row = [name: string, dpop: boolean, change: object];
  const accepted: Row[] = [
    ["RFC 6749 §5.1 a valid one", false, {}],
    ["RFC 6749 §5.1 token_type bearer", false, { token_type: "bearer" }],
    ["RFC 6749 §5.1 token_type BEARER", false, { token_type: "BEARER" }],
    ["RFC 9449 §5 a bound token", true, { token_type: "DPoP" }],
    ["RFC 9449 §5 token_type dpop", true, { token_type: "dpop" }],
    ["RFC 6750 §2.1 all characters", false, { access_token: "aZ09-._~+/==" }],
    ["members that are not known here", false, { refresh_token: "x", scope: "api1 api2" }],
  ];

  test.each(accepted)("%s (DPoP asked for: %p) → taken as it is", async (_, dpop, change) => {
    const answer = { ...validToken(1), ...change };
    const { client } = await scenario({ client: { dpop }, token: () => Response.json(answer) });
    expect(await client.accessToken()).toEqual(answer);
  });

  const refused: Row[] = [
    ["no access_token", false, { access_token: undefined }],
    ["access_token null", false, { access_token: null }],
    ["an empty access_token", false, { access_token: "" }],
    ["access_token a number", false, { access_token: 12345 }],
    ["access_token a list", false, { access_token: ["access-token-1"] }],
    ["access_token with a space", false, { access_token: "access-token-1 x" }],
    ["access_token with a line break", false, { access_token: "access-token-1\r\nx: y" }],
    ["access_token with = inside", false, { access_token: "access-token-1=x" }],
    ["access_token of = alone", false, { access_token: "=" }],
    ["access_token not in ASCII", false, { access_token: "access-token-é" }],
    ["RFC 6749 §7.1 no token_type", false, { token_type: undefined }],
    ["RFC 6749 §7.1 an unknown token_type", false, { token_type: "mac" }],
    ["RFC 6749 §7.1 token_type with more", false, { token_type: "Bearer x" }],
    ["token_type DPoP, not asked for", false, { token_type: "DPoP" }],
    ["RFC 9449 §5 token_type Bearer", true, { token_type: "Bearer" }],
    ["RFC 9449 §5 no token_type", true, { token_type: undefined }],
  ];

  test.each(refused)("%s (DPoP asked for: %p) → discarded", async (_, dpop, change) => {
    const token_type = dpop ? "DPoP" : "Bearer";
    const { client, identity, tokenEndpoint, calls } = await scenario({
      client: { dpop },
      token: () => Response.json({ ...validToken(1), token_type, ...change }),
    });
    expect(await messageOf(client.apiFetch(identity))).toBe(
      failure("The token request", tokenEndpoint, "no usable token"),
    );
    expect(calls).toEqual([]);
  });

  const answers: [name: string, answer: () => Answer, why: string][] = [
    ["status 201, token valid", () => Response.json(validToken(1), { status: 201 }), "201"],
    ["status 500, token valid", () => Response.json(validToken(1), { status: 500 }), "500"],
    ["no JSON", () => text("access_token=access-token-1&token_type=Bearer"), "no usable token"],
    ["JSON null", () => text("null"), "no usable token"],
    ["a token in gzip", () => packed(validToken(1)), "no usable token"],
    ["1 MiB and a byte", () => padded(validToken(1), limit + 1), tooLong],
  ];

  test.each(answers)("%s → one line", async (_, token, why) => {
    const { client, tokenEndpoint } = await scenario({ token });
    expect(await messageOf(client.accessToken())).toBe(
      failure("The token request", tokenEndpoint, why),
    );
  });
});

// --- Proofs --------------------------------------------------------------------------------------

describe("proofs", () => {
  const second = Math.floor(Date.now() / 1000);
  const jtis = new Set<unknown>();

  /** The claims and the key of a proof that is as RFC 9449 §4.2 has it. */
  async function verified({ headers }: Received) {
    const proof = headers.get("dpop") ?? "";
    const { payload, protectedHeader } = await jose.jwtVerify(proof, jose.EmbeddedJWK);
    const { jwk, ...header } = protectedHeader;
    expect(header).toEqual({ alg: "ES256", typ: "dpop+jwt" });
    expect(Object.keys(jwk!).sort()).toEqual(["crv", "kty", "x", "y"]);
    const { iat, jti, ...claims } = payload;
    expect(iat).toBe(second);
    expect(jti).toMatch(/^.{16,}$/);
    expect(jtis).not.toContain(jti);
    jtis.add(jti);
    return { claims, jkt: thumbprint({ ...jwk }) };
  }

  const ath = (accessToken: string) =>
    new Bun.CryptoHasher("sha256").update(accessToken).digest("base64url");

  /** A client with bound tokens, and the clock stopped within `second`. */
  async function bound(deviation: Scenario = {}) {
    const token = (count: number) => Response.json({ ...validToken(count), token_type: "DPoP" });
    const all = await scenario({ client: { dpop: true }, token, ...deviation });
    setSystemTime(new Date(second * 1000 + 999));
    return all;
  }

  test("RFC 9449 §5 at the token endpoint, §7 at the API: one key, and ath with the token", async () => {
    const { client, identity, tokenEndpoint, requests, tokenRequests, calls } = await bound();
    await client.apiFetch(identity);
    await client.apiFetch(identity);
    expect(requests[0]!.headers.get("dpop")).toBeNull(); // discovery
    const request = await verified(tokenRequests()[0]!);
    expect(request.claims).toEqual({ htm: "POST", htu: tokenEndpoint });
    for (const call of calls) {
      const { claims, jkt } = await verified(call);
      const expected = { htm: "GET", htu: identity, ath: ath("access-token-1") };
      expect(claims).toEqual(expected);
      expect(jkt).toBe(request.jkt);
      expect(call.headers.get("authorization")).toBe("DPoP access-token-1");
    }
    expect(calls).toHaveLength(2);
  });

  test("the scheme is the token_type as it came", async () => {
    const token = () => Response.json({ ...validToken(1), token_type: "dpop" });
    const { client, identity, calls } = await bound({ token });
    await client.apiFetch(identity);
    expect(calls[0]!.headers.get("authorization")).toBe("dpop access-token-1");
  });

  test("each client has a key of its own", async () => {
    const jkts = [];
    for (let clients = 0; clients < 2; clients++) {
      const { client, tokenRequests } = await bound();
      await client.accessToken();
      jkts.push((await verified(tokenRequests()[0]!)).jkt);
    }
    expect(new Set(jkts).size).toBe(2);
  });

  test("RFC 9449 §4.2 htu of a token_endpoint with a query is without it", async () => {
    const { client, issuer, tokenRequests } = await bound({
      metadata: (issuer) => Response.json({ issuer, token_endpoint: `${issuer}/token?tenant=1` }),
    });
    await client.accessToken();
    const { claims } = await verified(tokenRequests()[0]!);
    expect(claims).toEqual({ htm: "POST", htu: `${issuer}/token` });
  });

  const targets: [name: string, target: string, path: string][] = [
    ["a query", "/identity?page=2&x=/a", "/identity"],
    ["a fragment", "/identity#top", "/identity"],
    ["a query and a fragment", "/identity?page=2#top?", "/identity"],
    ["a fragment with a question mark", "/identity#a?b", "/identity"],
    ["a path of several segments", "/a/b%20c/", "/a/b%20c/"],
  ];

  test.each(targets)("RFC 9449 §4.2 htu of a call with %s", async (_, target, path) => {
    const { client, resource, calls } = await bound();
    await client.apiFetch(`${resource}${target}`);
    expect(calls[0]!.target).toBe(target.replace(/#.*/, ""));
    expect((await verified(calls[0]!)).claims["htu"]).toBe(`${resource}${path}`);
  });

  const methods = ["GET", "get", "POST", "post", "put", "delete", "patch", "HEAD", "options"];

  test.each(methods)("RFC 9449 §4.2 htm of a call with the method %s", async (method) => {
    const { client, identity, calls } = await bound();
    await client.apiFetch(identity, { method });
    expect(calls[0]!.method).toBe(method.toUpperCase());
    expect((await verified(calls[0]!)).claims["htm"]).toBe(method.toUpperCase());
  });

  test("RFC 9449 §7 a repeated call has a proof of its own, for the new token", async () => {
    const { client, identity, calls } = await bound({
      api: ({ headers }) => {
        const isOld = headers.get("authorization")!.endsWith("-1");
        const challenge = 'Bearer realm="x", DPoP error="invalid_token"';
        return isOld ? text("", 401, { "www-authenticate": challenge }) : text("ok");
      },
    });
    expect((await client.apiFetch(identity)).status).toBe(200);
    const [first, again] = [await verified(calls[0]!), await verified(calls[1]!)];
    expect(first.claims["ath"]).toBe(ath("access-token-1"));
    expect(again.claims["ath"]).toBe(ath("access-token-2"));
    expect(again.jkt).toBe(first.jkt);
  });

  test("without DPOP no proof is sent", async () => {
    const { client, identity, tokenRequests, calls } = await scenario();
    await client.apiFetch(identity);
    expect(tokenRequests()[0]!.headers.get("dpop")).toBeNull();
    expect(calls[0]!.headers.get("dpop")).toBeNull();
  });
});

// --- Messages ------------------------------------------------------------------------------------

describe("what is said about a refused token request", () => {
  const json = (status: number, members: unknown) => () => Response.json(members, { status });
  const challenge = (value: string) => () => text("", 401, { "www-authenticate": value });
  const rows: [name: string, answer: () => Answer, said: string, hint?: string][] = [
    [
      "code and description",
      json(400, { error: "invalid_request", error_description: "No such thing." }),
      "400 invalid_request No such thing.",
    ],
    ["a code alone", json(400, { error: "unauthorized_client" }), "400 unauthorized_client"],
    ["a description alone", json(400, { error_description: "Nope." }), "400 Nope."],
    [
      "invalid_client",
      json(401, { error: "invalid_client" }),
      "401 invalid_client",
      "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY.",
    ],
    [
      "invalid_scope",
      json(400, { error: "invalid_scope", error_description: "Unknown." }),
      "400 invalid_scope Unknown.",
      "Check SCOPE against the registration of the client.",
    ],
    [
      "invalid_dpop_proof",
      json(400, { error: "invalid_dpop_proof" }),
      "400 invalid_dpop_proof",
      "Set DPOP=1 if the client is registered for bound tokens.",
    ],
    [
      "insufficient_scope",
      json(403, { error: "insufficient_scope" }),
      "403 insufficient_scope",
      "Check SCOPE: the API requires another scope.",
    ],
    [
      "a hint's word in the description gives not that hint",
      json(400, { error: "invalid_request", error_description: "not invalid_client" }),
      "400 invalid_request not invalid_client",
    ],
    ["no JSON", () => text("<h1>Bad Gateway</h1>", 502), "502"],
    ["JSON null", () => text("null", 503), "503"],
    ["no body", () => text("", 500), "500"],
    [
      "the code in the challenge",
      challenge('Basic realm="x", error="invalid_client"'),
      "401 invalid_client",
      "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY.",
    ],
    ["a challenge without a code", challenge('Basic realm="x"'), "401"],
    [
      "control characters",
      json(400, { error: "x", error_description: "a\u0000b\tc\r\nd\u001b[2Je\u007f" }),
      "400 x a\\u0000b\\u0009c\\u000d\\u000ad\\u001b[2Je\\u007f",
    ],
    [
      "what is not ASCII",
      json(400, { error: "x", error_description: "é\u0085\u202e\u2028🔑" }),
      "400 x \\u00e9\\u0085\\u202e\\u2028\\ud83d\\udd11",
    ],
    [
      "control characters in the code",
      json(400, { error: "invalid\u001bscope" }),
      "400 invalid\\u001bscope",
    ],
    [
      "200 characters",
      json(400, { error: "x", error_description: "y".repeat(194) }),
      `400 x ${"y".repeat(194)}`,
    ],
    [
      "more than 200 characters",
      json(400, { error: "invalid_scope", error_description: `${"y".repeat(182)}NO` }),
      `400 invalid_scope ${"y".repeat(182)}`,
      "Check SCOPE against the registration of the client.",
    ],
  ];

  test.each(rows)("%s", async (_, token, said, hint = checkAll) => {
    const { client, tokenEndpoint } = await scenario({ token });
    const message = await messageOf(client.accessToken());
    // A space is printed once, see `fail`.
    expect(message.replace(/ +/g, " ")).toBe(
      failure("The token request", tokenEndpoint, said, hint),
    );
  });

  test("an address that came from the issuer is cut and escaped too", async () => {
    const path = `/\u001b[2J\u202e${"y".repeat(200)}`;
    const { client, issuer } = await scenario({
      metadata: (issuer) => Response.json({ issuer, token_endpoint: `${issuer}${path}` }),
      token: () => text("", 500),
    });
    const where = `${issuer}/\\u001b[2J\\u202e`.padEnd(200, "y");
    expect(await messageOf(client.accessToken())).toBe(failure("The token request", where, "500"));
  });
});

// --- accessToken ---------------------------------------------------------------------------------

describe("accessToken", () => {
  const start = Date.UTC(2030, 0, 1);
  const at = (seconds: number) => setSystemTime(new Date(start + 1000 * seconds));

  /** Answers with this lifetime, and says how many tokens were asked for so far. */
  async function withLifetime(expires_in: unknown) {
    const token = (count: number) => Response.json({ ...validToken(count), expires_in });
    const { client, tokenRequests } = await scenario({ token });
    at(0);
    return async () => {
      const { access_token } = await client.accessToken();
      expect(access_token).toBe(`access-token-${tokenRequests().length}`);
      return tokenRequests().length;
    };
  }

  const lifetimes: [expires_in: unknown, kept: number][] = [
    [3600, 3540],
    [121, 61],
    [120, 60],
    [119, 59.5],
    [60, 30],
    [1, 0.5],
  ];

  test.each(lifetimes)("expires_in %p → kept for %d s", async (expires_in, kept) => {
    const count = await withLifetime(expires_in);
    expect(await count()).toBe(1);
    expect(await count()).toBe(1);
    at(kept - 0.001);
    expect(await count()).toBe(1);
    at(kept);
    expect(await count()).toBe(2);
    at(kept + kept - 0.001);
    expect(await count()).toBe(2);
    at(kept + kept);
    expect(await count()).toBe(3);
  });

  test("the lifetime counts from before the request", async () => {
    const { client, tokenRequests } = await scenario({
      token: (count) => {
        at(100 * count);
        return Response.json(validToken(count));
      },
    });
    at(0);
    await client.accessToken();
    at(3539);
    await client.accessToken();
    expect(tokenRequests()).toHaveLength(1);
    at(3540);
    await client.accessToken();
    expect(tokenRequests()).toHaveLength(2);
  });

  const unusable: { expires_in: unknown }[] = [
    { expires_in: undefined },
    ...[null, 0, -1, -3600, "abc", "", {}, [], false].map((expires_in) => ({ expires_in })),
  ];

  test.each(unusable)("%j → used once", async ({ expires_in }) => {
    const count = await withLifetime(expires_in);
    expect([await count(), await count(), await count()]).toEqual([1, 2, 3]);
  });

  test("many callers at once → one request, the same token", async () => {
    const { client, requests } = await scenario();
    const tokens = await Promise.all(Array.from({ length: 50 }, () => client.accessToken()));
    expect(new Set(tokens)).toEqual(new Set([validToken(1)]));
    expect(requests.map(({ method }) => method)).toEqual(["GET", "POST"]);
  });

  test("many callers at once, no expires_in → one request", async () => {
    const { client, tokenRequests } = await scenario({
      token: (count) => Response.json({ ...validToken(count), expires_in: undefined }),
    });
    await Promise.all(Array.from({ length: 50 }, () => client.accessToken()));
    expect(tokenRequests()).toHaveLength(1);
  });

  test("many callers at once when it has expired → one request", async () => {
    const { client, tokenRequests } = await scenario();
    at(0);
    await client.accessToken();
    at(3540);
    const all = await Promise.all(Array.from({ length: 50 }, () => client.accessToken()));
    expect(new Set(all.map(({ access_token }) => access_token))).toEqual(
      new Set(["access-token-2"]),
    );
    expect(tokenRequests()).toHaveLength(2);
  });

  test("an error goes to all who wait, and is not kept", async () => {
    const { client, tokenEndpoint, requests } = await scenario({
      token: (count) => (count === 1 ? text("", 503) : Response.json(validToken(count))),
    });
    const waiting = Array.from({ length: 20 }, () => messageOf(client.accessToken()));
    const said = failure("The token request", tokenEndpoint, "503");
    expect(new Set(await Promise.all(waiting))).toEqual(new Set([said]));
    expect(requests.map(({ method }) => method)).toEqual(["GET", "POST"]);
    expect(await client.accessToken()).toEqual(validToken(2));
    expect(await client.accessToken()).toEqual(validToken(2));
  });

  test("a failed discovery is not kept", async () => {
    let count = 0;
    const { client } = await scenario({
      metadata: (issuer) =>
        (count += 1) === 1 ? text("", 503) : Response.json(validMetadata(issuer)),
    });
    await messageOf(client.accessToken());
    expect(await client.accessToken()).toEqual(validToken(1));
  });

  test("an unusable answer is not kept", async () => {
    const { client } = await scenario({
      token: (count) =>
        Response.json({ ...validToken(count), ...(count === 1 && { token_type: "mac" }) }),
    });
    await messageOf(client.accessToken());
    expect(await client.accessToken()).toEqual(validToken(2));
  });
});

// --- apiFetch ------------------------------------------------------------------------------------

describe("apiFetch", () => {
  test("RFC 6750 §2.1 the token goes into the Authorization field", async () => {
    const { client, resource, calls, tokenRequests } = await scenario({
      api: () => text("the answer", 201, { "x-more": "1" }),
    });
    const answer = await client.apiFetch(`${resource}/orders?page=2`);
    expect(answer.status).toBe(201);
    expect(answer.headers.get("x-more")).toBe("1");
    expect(await answer.text()).toBe("the answer");
    const [{ method, target, headers, body }] = calls as [Received];
    expect([method, target, body]).toEqual(["GET", "/orders?page=2", ""]);
    expect(headers.get("authorization")).toBe("Bearer access-token-1");
    await client.apiFetch(`${resource}/orders`);
    expect(tokenRequests()).toHaveLength(1);
  });

  test("RFC 6749 §5.1 the scheme is the token_type as it came", async () => {
    const { client, identity, calls } = await scenario({
      token: () => Response.json({ ...validToken(1), token_type: "bearer" }),
    });
    await client.apiFetch(identity);
    expect(calls[0]!.headers.get("authorization")).toBe("bearer access-token-1");
  });

  const fields: [name: string, headers: Bun.HeadersInit][] = [
    ["an object", { "x-trace": "7", authorization: "Basic eDp5", dpop: "x" }],
    ["a list", [["x-trace", "7"]]],
    ["Headers", new Headers({ "x-trace": "7", Authorization: "Bearer other" })],
  ];

  test.each(fields)("method, body and the headers given as %s are kept", async (_, headers) => {
    const { client, identity, calls } = await scenario();
    await client.apiFetch(identity, { method: "PUT", body: "text", headers });
    const [call] = calls as [Received];
    expect([call.method, call.body]).toEqual(["PUT", "text"]);
    expect(call.headers.get("x-trace")).toBe("7");
    expect(call.headers.get("authorization")).toBe("Bearer access-token-1");
  });

  const foreign: [name: string, url: (resource: string, other: string) => string][] = [
    ["another server", (_, other) => `${other}/identity`],
    ["another host name", (own) => `${own.replace("127.0.0.1", "localhost")}/identity`],
    ["another scheme", (own) => `${own.replace("http", "https")}/identity`],
    ["a port that it begins with", (own) => `${own.slice(0, -1)}/identity`],
    ["the host without a port", (own) => `${own.replace(/:\d+$/, "")}/identity`],
    ["another server, it as user name", (own, other) => other.replace("//", `//${own.slice(7)}@`)],
  ];

  test.each(foreign)("an address at %s → an error, nothing is sent", async (_, url) => {
    const other = serve(() => text(""));
    const { client, resource, requests, calls } = await scenario();
    const said = `The token is for ${resource} alone.`;
    expect(await messageOf(client.apiFetch(url(resource, other.origin)))).toBe(said);
    expect([requests, calls, other.received]).toEqual([[], [], []]);
  });

  test("a relative address → an error, nothing is sent", async () => {
    const { client, requests, calls } = await scenario();
    await messageOf(client.apiFetch("/identity"));
    expect([requests, calls]).toEqual([[], []]);
  });

  test.each([301, 302, 303, 307, 308])("redirect %d → returned, not followed", async (status) => {
    const other = serve(() => text(""));
    const { client, identity, calls } = await scenario({
      api: () => text("", status, { location: `${other.origin}/identity` }),
    });
    const answer = await client.apiFetch(identity, { redirect: "follow" });
    expect(answer.status).toBe(status);
    expect(answer.headers.get("location")).toBe(`${other.origin}/identity`);
    expect(other.received).toEqual([]);
    expect(calls).toHaveLength(1);
  });

  test("an answer of 1 MiB is returned, one byte more is an error", async () => {
    const { client, identity } = await scenario({
      api: (_, count) => text(Buffer.alloc(limit - 1 + count)),
    });
    expect(await (await client.apiFetch(identity)).bytes()).toHaveLength(limit);
    expect(await messageOf(client.apiFetch(identity))).toBe(failure("The call", identity, tooLong));
  });

  test("the caller's signal ends the call", async () => {
    const controller = new AbortController();
    const { client, identity, calls } = await scenario({ api: noAnswer });
    const call = messageOf(client.apiFetch(identity, { signal: controller.signal }));
    await eventually("the call arrives", () => calls.length);
    controller.abort();
    expect(await call).toStartWith(`The call failed at ${identity}: `);
  });

  test("the API is not there → one line that says what to try", async () => {
    const resource = closedOrigin();
    const { client } = await scenario({ client: { resource } });
    expect(await messageOf(client.apiFetch(`${resource}/identity`))).toBe(
      failure("The call", `${resource}/identity`, "ECONNREFUSED", startAll),
    );
  });
});

describe("apiFetch, RFC 6750 §3.1 invalid_token", () => {
  const invalidToken = { "www-authenticate": 'Bearer error="invalid_token", realm="x"' };
  const isFirst = ({ headers }: Received) => headers.get("authorization")!.endsWith("-1");

  /** Finds the first token not valid. */
  const rejecting = (received: Received) =>
    isFirst(received) ? text("no", 401, invalidToken) : text("yes");

  const bytes = new TextEncoder().encode("again=1");
  const bodies: [name: string, body: Bun.BodyInit | null][] = [
    ["no body", null],
    ["a string", "again=1"],
    ["a form", new URLSearchParams("again=1")],
    ["a Blob", new Blob(["again=1"])],
    ["bytes", bytes],
    ["a buffer", bytes.buffer],
  ];

  test.each(bodies)("a call with %s → once more, with a new token", async (_, body) => {
    const { client, identity, calls, tokenRequests } = await scenario({ api: rejecting });
    const headers = { "x-trace": "7" };
    const method = body === null ? "GET" : "POST";
    const answer = await client.apiFetch(identity, { method, headers, body });
    expect([answer.status, await answer.text()]).toEqual([200, "yes"]);
    const seen = calls.map((call) => [call.method, call.body, call.headers.get("authorization")]);
    const sent = body === null ? "" : "again=1";
    expect(seen).toEqual([
      [method, sent, "Bearer access-token-1"],
      [method, sent, "Bearer access-token-2"],
    ]);
    expect(calls.map((call) => call.headers.get("x-trace"))).toEqual(["7", "7"]);
    expect(tokenRequests()).toHaveLength(2);
    await client.apiFetch(identity);
    expect(tokenRequests()).toHaveLength(2);
  });

  test("a call with a multipart form → once more, with a new token", async () => {
    const { client, identity, calls } = await scenario({ api: rejecting });
    const body = new FormData();
    body.set("again", "1");
    expect((await client.apiFetch(identity, { method: "POST", body })).status).toBe(200);
    const parts = calls.map(({ body: sent, headers }) =>
      new Response(sent, { headers: { "content-type": headers.get("content-type")! } }).formData(),
    );
    const values = (await Promise.all(parts)).map((form) => form.get("again"));
    expect(values).toEqual(["1", "1"]);
  });

  async function* generated() {
    yield "once=";
    yield "1";
  }
  const once: [name: string, body: () => Bun.BodyInit][] = [
    ["a stream", () => new Response("once=1").body!],
    ["a generator", generated],
  ];

  test.each(once)("a call with %s, which can be read once → the 401", async (_, body) => {
    const { client, identity, calls } = await scenario({ api: rejecting });
    const answer = await client.apiFetch(identity, { method: "POST", body: body() });
    expect([answer.status, await answer.text()]).toEqual([401, "no"]);
    expect(calls.map(({ body: sent }) => sent)).toEqual(["once=1"]);
  });

  const others: [name: string, status: number, challenge: string | undefined][] = [
    ["401 without a challenge", 401, undefined],
    ["401 without error", 401, "Bearer"],
    ["401 invalid_request", 401, 'Bearer error="invalid_request"'],
    ["401 invalid_dpop_proof", 401, 'DPoP error="invalid_dpop_proof"'],
    ["401 with invalid_token in the text alone", 401, 'Bearer error_description="invalid_token"'],
    ["403 invalid_token", 403, 'Bearer error="invalid_token"'],
    ["400 invalid_token", 400, 'Bearer error="invalid_token"'],
    ["200 invalid_token", 200, 'Bearer error="invalid_token"'],
  ];

  test.each(others)("%s → returned", async (_, status, challenge) => {
    const headers = challenge ? { "www-authenticate": challenge } : {};
    const { client, identity, calls, tokenRequests } = await scenario({
      api: () => text("", status, headers),
    });
    expect((await client.apiFetch(identity)).status).toBe(status);
    expect(calls).toHaveLength(1);
    await client.apiFetch(identity);
    expect(tokenRequests()).toHaveLength(1);
  });

  test("the new token is not valid either → the second 401", async () => {
    const { client, identity, calls, tokenRequests } = await scenario({
      api: (_, count) => text(`${count}`, 401, invalidToken),
    });
    const answer = await client.apiFetch(identity);
    expect([answer.status, await answer.text()]).toEqual([401, "2"]);
    expect(calls).toHaveLength(2);
    expect(tokenRequests()).toHaveLength(2);
  });

  test("no new token to be had → the error of the token request", async () => {
    const { client, identity, tokenEndpoint, calls } = await scenario({
      token: (count) => (count > 1 ? text("", 503) : Response.json(validToken(count))),
      api: rejecting,
    });
    expect(await messageOf(client.apiFetch(identity))).toBe(
      failure("The token request", tokenEndpoint, "503"),
    );
    expect(calls).toHaveLength(1);
  });

  test("many callers at once → one renewal", async () => {
    const all = Promise.withResolvers<void>();
    const { client, identity, calls, tokenRequests } = await scenario({
      api: async (received, count) => {
        if (count === 20) all.resolve();
        await all.promise;
        return rejecting(received);
      },
    });
    const answers = await Promise.all(Array.from({ length: 20 }, () => client.apiFetch(identity)));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([200]));
    expect(calls).toHaveLength(40);
    expect(tokenRequests()).toHaveLength(2);
  });

  test("a 401 that arrives after the renewal → no second one", async () => {
    const late = Promise.withResolvers<void>();
    const { client, resource, calls, tokenRequests } = await scenario({
      api: async (received) => {
        if (received.target === "/late" && isFirst(received)) await late.promise;
        return rejecting(received);
      },
    });
    const held = client.apiFetch(`${resource}/late`);
    await eventually("the call arrives", () => calls.length);
    expect((await client.apiFetch(`${resource}/identity`)).status).toBe(200);
    late.resolve();
    expect((await held).status).toBe(200);
    expect(tokenRequests()).toHaveLength(2);
    expect(calls.at(-1)!.headers.get("authorization")).toBe("Bearer access-token-2");
  });
});

// --- The program ---------------------------------------------------------------------------------

/** A token that the client can show: its signature is nobody's business here. */
const jwt = (header: object, claims: object) =>
  [header, claims]
    .map((part) => Buffer.from(JSON.stringify(part)).toString("base64url"))
    .concat("c2lnbmF0dXJl")
    .join(".");

const shownHeader = { alg: "ES256", kid: "k", typ: "at+jwt" };
const shownClaims = { sub: "client", note: "caf\u00e9" };
const shownToken = { ...validToken(1), access_token: jwt(shownHeader, shownClaims) };

describe("run", () => {
  const token = () => Response.json(shownToken);

  test("prints the token response, the token decoded, and the API's answer", async () => {
    const answer = [{ type: "sub", value: "client" }];
    const { client, issuer, identity, calls } = await scenario({
      token,
      api: () => Response.json(answer),
    });
    const { stdout, stderr } = await printed(client.run);
    expect(stdout.map((document) => JSON.parse(document))).toEqual([
      shownToken,
      { header: shownHeader, claims: shownClaims },
      answer,
    ]);
    expect(stdout[2]).toBe(JSON.stringify(answer, null, 2));
    expect(stderr).toEqual([`Requesting a token for client from ${issuer}`, `Calling ${identity}`]);
    expect(calls.map(({ method, target }) => `${method} ${target}`)).toEqual(["GET /identity"]);
  });

  test("what is not printable ASCII is escaped as JSON does it", async () => {
    const answer = [{ type: "café\u001b[2J\n", value: "\u007f\u0085\u202e\u2028🔑" }];
    const { client } = await scenario({ token, api: () => Response.json(answer) });
    const { stdout } = await printed(client.run);
    expect(stdout.join("\n")).toMatch(/^[\n -~]+$/);
    expect(stdout[1]).toContain('"note": "caf\\u00e9"');
    expect(stdout[2]).toContain('"type": "caf\\u00e9\\u001b[2J\\n",');
    expect(stdout[2]).toContain('"value": "\\u007f\\u0085\\u202e\\u2028\\ud83d\\udd11"');
    expect(JSON.parse(stdout[2]!)).toEqual(answer);
  });

  const bearer = (error: string) => ({ "www-authenticate": `Bearer error="${error}"` });
  const answers: [name: string, answer: () => Answer, said: string, hint?: string][] = [
    [
      "401 invalid_token, twice",
      () => text("no", 401, bearer("invalid_token")),
      "401 invalid_token",
    ],
    [
      "403 insufficient_scope",
      () => text("no", 403, bearer("insufficient_scope")),
      "403 insufficient_scope",
      "Check SCOPE: the API requires another scope.",
    ],
    [
      "the error in the second challenge",
      () =>
        text("no", 401, { "www-authenticate": 'Bearer realm="x", DPoP error="invalid_request"' }),
      "401 invalid_request",
    ],
    ["503", () => text("no", 503), "503"],
    ["a redirect", () => text("", 302, { location: "/other" }), "302"],
    ["control characters", () => text("", 401, bearer("\u009b2J")), "401 \\u009b2J"],
  ];

  test.each(answers)("the API answers %s → one line", async (_, api, said, hint = checkAll) => {
    const { client, identity } = await scenario({ token, api });
    await printed(async () =>
      expect(await messageOf(client.run())).toBe(failure("The call", identity, said, hint)),
    );
  });

  test("a token that is no JWT → one line that says where it came from", async () => {
    const { client, issuer } = await scenario();
    const said = failure("Decoding the token", issuer, "it is no JWT");
    await printed(async () => expect(await messageOf(client.run())).toBe(said));
  });
});

describe("bun run client.ts", () => {
  /** What both servers answer; a GET of the issuer is discovery, or the first look of --wait. */
  const issuerAnswer = (origin: () => string) => (received: Received) =>
    Response.json(received.method === "GET" ? validMetadata(origin()) : shownToken);

  function servers() {
    const issuer = serve(issuerAnswer(() => issuer.origin));
    const api = serve(() => Response.json([]));
    return { issuer, api, env: { ISSUER: issuer.origin, API_URL: api.origin } };
  }

  test("all is well → JSON on stdout, two lines on stderr, exit code 0", async () => {
    const { issuer, env } = servers();
    const settings = { CLIENT_ID: "a", CLIENT_SECRET: "b", SCOPE: "c" };
    const client = launch("client", { env: { ...env, ...settings } });
    expect(await client.ended()).toBe(0);
    expect(client.stderr).toBe(
      `Requesting a token for a from ${env.ISSUER}\nCalling ${env.API_URL}/identity\n`,
    );
    const documents = client.stdout.trimEnd().split(/\n(?=[[{])/);
    expect(documents.map((document) => JSON.parse(document))).toEqual([
      shownToken,
      { header: shownHeader, claims: shownClaims },
      [],
    ]);
    const request = issuer.received.find(({ method }) => method === "POST")!;
    expect(request.headers.get("authorization")).toBe(`Basic ${btoa("a:b")}`);
    expect(request.headers.get("dpop")).toBeNull();
    expect(request.body).toBe("grant_type=client_credentials&scope=c");
  });

  test("a failure → one line, exit code 1, nothing on stdout", async () => {
    const { env } = servers();
    const settings = { DPOP: "1", CLIENT_SECRET: client_secret };
    const client = launch("client", { env: { ...env, ...settings } });
    expect(await client.ended()).toBe(1);
    expect(client.stdout).toBe("");
    expect(client.stderr.split("\n")).toEqual([
      `Requesting a token for client from ${env.ISSUER}`,
      `error: ${failure("The token request", `${env.ISSUER}/connect/token`, "no usable token")}`,
      "",
    ]);
  });

  test("--wait waits until both servers take connections", async () => {
    const ports = [freePort(), freePort()] as const;
    const [issuerUrl, apiUrl] = ports.map((port) => `http://127.0.0.1:${port}`);
    const client = launch("client", {
      env: { ISSUER: issuerUrl, API_URL: apiUrl },
      arguments: ["--wait"],
    });
    await Bun.sleep(1_000); // servers that are slow to start
    expect([client.process.exitCode, client.stderr]).toEqual([null, ""]);
    const issuer = serve(
      issuerAnswer(() => issuerUrl!),
      { port: ports[0] },
    );
    await eventually("the client finds the issuer", () => issuer.received.length);
    const api = serve(() => Response.json([]), { port: ports[1] });
    expect(await client.ended()).toBe(0);
    const seen = [issuer, api].map(({ received }) => received.map(({ target }) => target));
    expect(seen).toEqual([
      ["/", discovery, "/connect/token"],
      ["/", "/identity"],
    ]);
    expect(issuer.received[0]!.headers.get("authorization")).toBeNull();
    expect(api.received[0]!.headers.get("authorization")).toBeNull();
    expect(client.stderr.trimEnd().split("\n")).toHaveLength(2);
  });

  test("without --wait it does not wait", async () => {
    const env = { ISSUER: closedOrigin(), API_URL: closedOrigin() };
    const client = launch("client", { env });
    expect(await client.ended()).toBe(1);
    expect(client.stderr).toContain("ECONNREFUSED");
  });

  const problems: [name: string, issuer: () => string, said: RegExp][] = [
    ["hangs up", hangUp, /^error: Discovery failed at \S+: ECONNRESET \(Check /],
    [
      "is no address",
      () => `localhost:${freePort()}`,
      /^error: ISSUER must be a bare https origin/,
    ],
  ];

  test.each(problems)("--wait does not wait for an issuer that %s", async (_, issuer, said) => {
    const { env } = servers();
    const client = launch("client", {
      env: { ...env, ISSUER: issuer() },
      arguments: ["--wait"],
    });
    expect(await client.ended()).toBe(1);
    expect(client.stderr.trimEnd().split("\n").at(-1)).toMatch(said);
  });

  describe("https", () => {
    const directory = temporaryDirectory();
    const [cert, key] = [join(directory, "cert.pem"), join(directory, "key.pem")];
    Bun.spawnSync(
      `openssl req -x509 -days 1 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj
        /CN=localhost -addext subjectAltName=DNS:localhost -keyout ${key} -out ${cert}`.split(
        /\s+/,
      ),
    );

    /** Both parties in one server, behind the certificate. */
    function secured(metadata: (issuer: string) => object) {
      const tls = { cert: Bun.file(cert), key: Bun.file(key) };
      const answer = ({ method, target }: Received) =>
        Response.json(method === "POST" ? shownToken : target === "/identity" ? [] : metadata(url));
      const server = serve(answer, { hostname: "localhost", tls });
      const url = server.origin;
      return { received: server.received, env: { ISSUER: url, API_URL: url } };
    }

    const trust = "Start all in one directory, or set TLS_CERT or NODE_EXTRA_CA_CERTS.";

    test("an untrusted certificate → one line that says what to try", async () => {
      const { received, env } = secured(validMetadata);
      const client = launch("client", { env });
      expect(await client.ended()).toBe(1);
      const where = env.ISSUER + discovery;
      const said = failure("Discovery", where, "DEPTH_ZERO_SELF_SIGNED_CERT", trust);
      expect(client.stderr).toEndWith(`\nerror: ${said}\n`);
      expect(received).toEqual([]);
    });

    test("NODE_EXTRA_CA_CERTS helps, as the line says", async () => {
      const { env } = secured(validMetadata);
      const client = launch("client", { env: { ...env, NODE_EXTRA_CA_CERTS: cert } });
      expect(await client.ended()).toBe(0);
    });

    test("token_endpoint with http → one line, and no token request", async () => {
      const plain = serve(() => Response.json(shownToken));
      const { received, env } = secured((issuer) => ({
        issuer,
        token_endpoint: `${issuer.replace("https", "http")}/connect/token`,
      }));
      const client = launch("client", { env: { ...env, NODE_EXTRA_CA_CERTS: cert } });
      expect(await client.ended()).toBe(1);
      const why = notOurs.replace("ISSUER", env.ISSUER);
      const said = failure("Discovery", env.ISSUER + discovery, why);
      expect(client.stderr).toEndWith(`\nerror: ${said}\n`);
      expect(received.map(({ method }) => method)).toEqual(["GET"]);
      expect(plain.received).toEqual([]);
    });
  });
});

describe("bun run client.ts --new-key", () => {
  const cwd = temporaryDirectory();
  const file = join(cwd, "keys/client.jwk");
  let publicJwk: jose.JWK = {};

  test("makes a key pair: the private JWK in a file, the public one on stdout", async () => {
    const client = launch("client", { cwd, arguments: ["--new-key"] });
    expect(await client.ended()).toBe(0);
    expect(client.stderr).toBe("");
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(statSync(join(cwd, "keys")).mode & 0o777).toBe(0o700);
    expect(readdirSync(join(cwd, "keys"))).toEqual(["client.jwk"]);
    publicJwk = JSON.parse(client.stdout);
    expect(Object.keys(publicJwk).sort()).toEqual(["alg", "crv", "kid", "kty", "x", "y"]);
    expect(publicJwk).toMatchObject({ alg: "ES256", crv: "P-256", kty: "EC" });
    expect(publicJwk.kid).toBe(thumbprint({ ...publicJwk })); // RFC 7638 §3
    const { d, ...rest } = JSON.parse(readFileSync(file, "utf8"));
    expect(d).toMatch(/^[\w-]{43}$/);
    expect(rest).toEqual(publicJwk);
  });

  test("does not overwrite the file: one line, exit code 1", async () => {
    const before = readFileSync(file, "utf8");
    const client = launch("client", { cwd, arguments: ["--new-key"] });
    expect(await client.ended()).toBe(1);
    expect(client.stdout).toBe("");
    expect(client.stderr).toMatch(/^error: .*keys\/client\.jwk.*\n$/);
    expect(readFileSync(file, "utf8")).toBe(before);
  });

  test("another pair each time", async () => {
    const other = temporaryDirectory();
    const client = launch("client", { cwd: other, arguments: ["--new-key"] });
    expect(await client.ended()).toBe(0);
    expect(JSON.parse(client.stdout).kid).not.toBe(publicJwk.kid);
    expect(existsSync(join(other, "keys/client.jwk"))).toBeTrue();
  });

  test.each(["0", "1"])("idp.ts and api.ts take the pair, with DPOP=%s", async (dpop) => {
    const [issuer, resource] = [closedOrigin(), closedOrigin()];
    const registration = {
      client_id: "with a key",
      jwks: { keys: [publicJwk] },
      grant_types: ["client_credentials"],
      scope: "api1",
      access_token_lifetime_seconds: 600,
      dpop_bound_access_tokens: dpop === "1",
    };
    const authorizationServer = {
      issuer,
      scopes: [{ scope: "api1", description: "My API", resource }],
      clients: [registration],
      databaseUrl: `sqlite://${temporaryDirectory()}/keys.db`,
    };
    const log = captureLog();
    try {
      const start = async (module: Idp | Api) => {
        const server = await module.start();
        stops.push(() => server.stop(true));
      };
      await withModule("idp", { authorizationServer }, start);
      await withModule("api", { resourceServer: { issuer, resource } }, start);
      const client = launch("client", {
        cwd,
        env: {
          ISSUER: issuer,
          API_URL: resource,
          CLIENT_ID: "with a key",
          CLIENT_KEY: "keys/client.jwk",
          DPOP: dpop,
        },
      });
      expect([await client.ended(), client.stderr.split("\n").length]).toEqual([0, 3]);
      const documents = client.stdout.trimEnd().split(/\n(?=[[{])/);
      const [response, decoded, claims] = documents.map((document) => JSON.parse(document));
      expect(response.token_type).toBe(dpop === "1" ? "DPoP" : "Bearer");
      expect("cnf" in decoded.claims).toBe(dpop === "1");
      expect(claims).toContainEqual({ type: "client_id", value: "with a key" });
      await log.until(1);
    } finally {
      log.stop();
    }
  });
});
