/** How the servers start and stop, and what they log: nothing lost, nothing forged, nothing told. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, constants, openSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { Connection } from "../attack/hostile.ts";
import { eventually } from "../support/databases.ts";
import { post, send } from "../support/http.ts";
import { accessToken, assertion, assertionType, Issuer, key, proof } from "../support/jwt.ts";
import { launch, launchWith, Program, root, temporaryDirectory } from "../support/programs.ts";
import { urlOf } from "../support/programs.ts";
import { api, idp, pair, resource } from "../support/servers.ts";

setDefaultTimeout(20_000); // most of it runs at the same time

const registration = authorizationServer.clients[0]!;
const right = { grant_type: "client_credentials", client_id: "client", client_secret: "secret" };
const local = { ISSUER: "http://127.0.0.1:0", API_URL: "http://127.0.0.1:0" };
const issuerKey = await key();

const get = (path: string, fields = "") => `GET ${path} HTTP/1.1\r\nHost: a\r\n${fields}\r\n`;
const form = new URLSearchParams(right).toString();
const postHead = (path: string, length: number) =>
  `POST ${path} HTTP/1.1\r\nHost: a\r\nContent-Length: ${length}\r\n` +
  "Content-Type: application/x-www-form-urlencoded\r\n\r\n";

const isRefused = async (url: string) =>
  (await fetch(url, { keepalive: false }).catch(() => undefined)) === undefined;

// --- Starting ------------------------------------------------------------------------------------

describe("starting", () => {
  test("two servers with different settings run in one process, and stop alone", async () => {
    const tenant = { ...registration, client_id: "tenant", access_token_lifetime_seconds: 60 };
    const [first, second] = [await idp(), await idp({ clients: [tenant] })];
    const ask = async (url: string, client_id: string) => {
      const { status, json } = await post(url, { ...right, client_id });
      return [status, json.expires_in];
    };
    expect(await ask(first.tokenEndpoint, "client")).toEqual([200, 3600]);
    expect(await ask(first.tokenEndpoint, "tenant")).toEqual([401, undefined]);
    expect(await ask(second.tokenEndpoint, "client")).toEqual([401, undefined]);
    const kids = [...first.lines, ...second.lines].flatMap(({ kid }) => kid ?? []);
    expect(new Set(kids).size).toBe(4); // two keys each
    await first.stop();
    expect(await isRefused(first.url)).toBe(true);
    expect(await ask(second.tokenEndpoint, "tenant")).toEqual([200, 60]);
    const events = second.lines.map(({ event, client_id }) => `${event} ${client_id}`).slice(2);
    expect(events).toEqual(["token refused undefined", "token issued tenant"]);
    await second.stop();
  });

  test("two servers share a port where both have reusePort, and only there", async () => {
    const first = await idp({ reusePort: true });
    await expect(idp({ issuer: first.url })).rejects.toThrow();
    const second = await idp({ issuer: first.url, reusePort: true });
    await first.stop();
    expect((await send(`${second.url}/health`)).status).toBe(200);
    await second.stop();
    const issuer = "http://127.0.0.1:9";
    const third = await api(issuer, { reusePort: true });
    await expect(api(issuer, { resource: third.url })).rejects.toThrow();
    await (await api(issuer, { resource: third.url, reusePort: true })).stop();
    await third.stop();
  });

  test.concurrent("importing the four files does nothing: no output, no file, no end", async () => {
    const cwd = temporaryDirectory();
    const files = ["config", "idp", "api", "client"].map((name) => join(root, `${name}.ts`));
    const script = `${files.map((file) => `await import("${file}");`).join("\n")} console.log(1);`;
    const program = new Program([process.execPath, "--eval", script], cwd);
    expect([await program.ended(), program.stdout, program.stderr]).toEqual([0, "1\n", ""]);
    expect(readdirSync(cwd)).toEqual([]);
  });

  const programs = ["idp", "api"] as const;
  test.concurrent.each(programs)("%s.ts, port in use → one line, exit code 1", async (program) => {
    const taken = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response() });
    const url = taken.url.origin;
    const second = launch(program, { env: { ISSUER: url, API_URL: url, LOG: "off" } });
    expect([await second.ended(), second.stdout]).toEqual([1, ""]);
    expect(second.stderr).toMatch(new RegExp(`^error: [^\n]*\\b${taken.port}\\b[^\n]*\n$`));
    await taken.stop(true);
  });
});

// --- Stopping ------------------------------------------------------------------------------------

type Kind = "idp" | "api";

/** Starts a server as a program, with a request that it lets in and one that it does not. */
async function started(kind: Kind, drainSeconds = 0.5) {
  const issuer = new Issuer([issuerKey]);
  const env = kind === "idp" ? local : { ...local, ISSUER: issuer.url };
  const changes = { authorizationServer: { drainSeconds }, resourceServer: { drainSeconds } };
  const program = drainSeconds > 1 ? launchWith(kind, changes, { env }) : launch(kind, { env });
  const url = await urlOf(program);
  const token = await accessToken(issuerKey, issuer.url, url);
  const wrong = form.replace("=secret", "=wrong");
  const requests = {
    idp: [form, wrong].map((body) => postHead("/connect/token", body.length) + body),
    api: [get("/identity", `Authorization: Bearer ${token}\r\n`), get("/identity")],
  }[kind];
  return { program, url, requests, token };
}

describe("stopping", () => {
  const underLoad: [Kind, NodeJS.Signals][] = [
    ["idp", "SIGTERM"],
    ["api", "SIGINT"],
  ];
  test.concurrent.each(underLoad)("%s.ts, %s under load → all answered", async (kind, signal) => {
    const { program, url, requests } = await started(kind);
    const statuses: [right: unknown[], wrong: unknown[]] = [[], []];
    const work = async (first: number) => {
      const connection = new Connection(url);
      for (let turn = first; ; turn = 1 - turn) {
        const { status, headers } = await connection.send(requests[turn]!);
        statuses[turn]!.push(status);
        if (status === 0 || headers.get("connection") === "close") return connection.close();
      }
    };
    const working = [0, 1, 0, 1].map(work);
    await eventually("there are answers", () => statuses.flat().length > 20);
    program.process.kill(signal);
    await Promise.all(working);
    expect(await program.ended()).toBe(0);
    expect(statuses.map((all) => [...new Set(all)])).toEqual([[200], [401]]);
    // `log` parses the lines, so that each is whole.
    const [accepted, refused] = statuses.map((all) => all.length) as [number, number];
    const expected = {
      idp: { "key made": 2, "token issued": accepted, "token refused": refused },
      api: { "call refused": refused },
    }[kind];
    const logged = Map.groupBy(program.log, ({ event }) => event);
    const counts = [...logged].map(([event, lines]) => [event, lines.length]);
    expect(Object.fromEntries(counts)).toEqual(expected);
    expect(program.stdout.split("\n").length - 1).toBe(program.log.length);
    expect(program.stderr).toBe(`${kind === "idp" ? "authorization server" : "API"}: ${url}\n`);
  });

  const ask = (body: object) => ({ method: "POST", body: new URLSearchParams({ ...body }) });
  const documents: Record<Kind, [path: string, init: BunFetchRequestInit, status: number][]> = {
    idp: [
      ["/.well-known/openid-configuration", {}, 200],
      ["/.well-known/openid-configuration/jwks", {}, 200],
      ["/connect/token", ask(right), 200],
      ["/connect/token", ask({ scope: "api1" }), 401],
      ["/connect/token", { method: "POST", body: "{}" }, 400],
      ["/connect/token", {}, 405],
      ["/nothing", {}, 404],
    ],
    api: [
      ["/.well-known/oauth-protected-resource", {}, 200],
      ["/identity", {}, 401],
      ["/identity", { method: "PUT" }, 405],
      ["/nothing", {}, 404],
    ],
  };
  const twice: [Kind, NodeJS.Signals, NodeJS.Signals][] = [
    ["idp", "SIGTERM", "SIGTERM"],
    ["api", "SIGINT", "SIGTERM"],
  ];
  // It drains: /health is 503 and every answer closes its connection. A second signal ends it.
  test.concurrent.each(twice)("%s.ts, %s → drains; %s → exit code 1", async (kind, ...signals) => {
    const { program, url, token } = await started(kind, 600);
    const headers = { authorization: `Bearer ${token}` };
    if (kind === "api") expect((await send(`${url}/identity`, { headers })).status).toBe(200);
    const health = async () => await send(`${url}/health`);
    const requireAnswers = async (closes: boolean) => {
      for (const [path, init, status] of documents[kind]) {
        const answer = await send(url + path, init);
        const isClosed = answer.headers.get("connection") === "close";
        expect([path, answer.status, isClosed]).toEqual([path, status, closes]);
      }
    };
    await requireAnswers(false);
    expect(await health()).toMatchObject({ status: 200, json: { status: "ok" } });
    program.process.kill(signals[0]);
    await eventually("it drains", async () => (await health()).status === 503);
    const draining = await health();
    const fields = ["cache-control", "connection"].map((name) => draining.headers.get(name));
    expect([draining.json, ...fields]).toEqual([{ status: "unavailable" }, "no-store", "close"]);
    await requireAnswers(true);
    program.process.kill(signals[1]);
    expect([await program.ended(), program.process.signalCode]).toEqual([1, null]);
  });

  test.concurrent("a log that never arrives, or fails, keeps no server from stopping", async () => {
    const late = () => Promise.withResolvers().promise;
    let flushed = 0;
    for (const outcome of [late, () => Promise.reject(new Error("closed"))]) {
      const flush = () => (flushed++, outcome());
      await (await idp({ log: { write: () => {}, flush } })).stop();
    }
    expect(flushed).toBe(2);
  });
});

// --- Log -----------------------------------------------------------------------------------------

/** A pipe that nobody reads from until `read` is called, or ever after `close`. */
class Pipe {
  readonly path = join(temporaryDirectory(), "pipe");
  readonly #descriptor: number;

  constructor() {
    expect(Bun.spawnSync(["mkfifo", this.path]).exitCode).toBe(0);
    this.#descriptor = openSync(this.path, constants.O_RDONLY | constants.O_NONBLOCK);
  }

  close = () => closeSync(this.#descriptor);
  read = () => new Program(["cat", this.path], root);
}

/** An authorization server that issues tokens with a scope of so many characters. */
const verbose = (characters: number) => {
  const scope = "x".repeat(characters);
  const clients = [{ ...registration, scope }];
  return { issuer: local.ISSUER, scopes: [{ scope, description: "", resource }], clients };
};

/** It as a program, with a redirection by the shell, such as `> pipe`. */
async function redirected(redirection: string) {
  const cwd = temporaryDirectory();
  const settings = JSON.stringify({ ...verbose(100_000), drainSeconds: 0.01 });
  const script = `
    import { authorizationServer, runProgram } from "${join(root, "config.ts")}";
    import { start } from "${join(root, "idp.ts")}";
    await runProgram("started", async () => {
      const running = await start({ ...authorizationServer, ...${settings} });
      await Bun.write("url", running.url);
      return running;
    });`;
  await Bun.write(join(cwd, "server.ts"), script);
  const command = `exec '${process.execPath}' --no-orphans server.ts ${redirection}`;
  const program = new Program(["sh", "-c", command], cwd);
  const url = () => readFileSync(join(cwd, "url"), "utf8");
  await eventually("it serves", () => readdirSync(cwd).includes("url") && url());
  const issue = async () => (await post(`${url()}/connect/token`, right)).status;
  return { program, cwd, issue };
}

describe("stdout", () => {
  test.concurrent("LOG=off silences it", async () => {
    const program = launch("idp", { env: { ...local, LOG: "off" } });
    const url = await urlOf(program);
    expect((await post(`${url}/connect/token`, right)).status).toBe(200);
    expect(await program.stop("SIGTERM")).toBe(0);
    expect([program.stdout, program.stderr]).toEqual(["", `authorization server: ${url}\n`]);
  });

  test.concurrent("a reader that stops holds up no request, and gets whole lines", async () => {
    const pipe = new Pipe();
    const { program, issue } = await redirected(`> '${pipe.path}'`);
    const count = 20;
    for (let sent = 0; sent < count; sent++) expect(await issue()).toBe(200);
    const reader = pipe.read();
    await reader.printed(/\n/, "stdout");
    pipe.close();
    let more = 0;
    await eventually("there is room again", async () => {
      more++;
      expect(await issue()).toBe(200);
      return reader.stdout.includes('"dropped":');
    });
    expect([await program.stop("SIGTERM"), await reader.ended()]).toEqual([0, 0]);
    const entries = reader.log;
    const dropped = entries.reduce((sum, entry) => sum + (entry["dropped"] ?? 0), 0);
    expect(dropped).toBeGreaterThan(0);
    expect(entries.length + dropped).toBe(2 + count + more); // two keys were made
    expect(reader.stdout.split("\n").length - 1).toBe(entries.length);
  });

  test.concurrent("a reader that ends does not end the server", async () => {
    const pipe = new Pipe();
    const { program, issue } = await redirected(`> '${pipe.path}'`);
    pipe.close();
    for (let sent = 0; sent < 15; sent++) expect(await issue()).toBe(200);
    expect(await program.stop("SIGTERM")).toBe(0);
    expect(program.stderr).toMatch(/^started: [^\n]+\n$/);
  });

  test.concurrent("without stdout and stderr it serves, and no file gets the log", async () => {
    const { program, issue, cwd } = await redirected(">&- 2>&-");
    expect(await issue()).toBe(200);
    expect(await program.stop("SIGTERM")).toBe(0);
    for (const file of readdirSync(join(cwd, "keys")))
      expect(await Bun.file(join(cwd, "keys", file)).text()).not.toContain("token issued");
  });
});

describe("answers under way while stopping", () => {
  test("idp.ts, a body still on its way → answered; an idle connection → closed", async () => {
    const server = await idp();
    const [slow, idle] = [new Connection(server.url), new Connection(server.url)];
    expect((await idle.send(get("/health"))).status).toBe(200);
    slow.write(postHead("/connect/token", form.length) + form.slice(0, 20));
    await send(`${server.url}/health`);
    const stopped = server.stop();
    await eventually("nobody listens", () => isRefused(server.url));
    const { status, headers } = await slow.send(form.slice(20));
    expect([status, headers.get("connection")]).toEqual([200, "close"]);
    await stopped;
    await eventually("the idle connection is closed", () => idle.isClosed);
    expect(server.lines.at(-1)!.event).toBe("token issued");
  });

  test("api.ts, a call that waits for the issuer's keys → answered", async () => {
    const issuer = new Issuer([issuerKey]);
    const gate = Promise.withResolvers<undefined>();
    issuer.answer = () => gate.promise as never; // then it answers as ever
    const server = await api(issuer.url);
    const token = await accessToken(issuerKey, issuer.url, server.url);
    const slow = new Connection(server.url);
    slow.write(get("/identity", `Authorization: Bearer ${token}\r\n`));
    await eventually("the keys are asked for", () => issuer.requests.length > 0);
    const stopped = server.stop();
    await eventually("nobody listens", () => isRefused(server.url));
    gate.resolve(undefined);
    const { status, headers } = await slow.next();
    expect([status, headers.get("connection")]).toEqual([200, "close"]);
    await stopped;
  });
});

describe("lines of the log", () => {
  test("one object for each token issued or refused, call refused, key made", async () => {
    const { idp: server, api: protectedApi } = await pair();
    const { json } = await post(server.tokenEndpoint, right);
    await post(server.tokenEndpoint, { ...right, client_secret: "wrong" });
    await send(`${protectedApi.url}/identity`);
    const [made, successor, issued, refused, ...others] = server.lines;
    const { jti } = jose.decodeJwt(json.access_token);
    const time = expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    const request = { time, address: "127.0.0.1", milliseconds: expect.any(Number) };
    const why = { ...request, reason: expect.stringMatching(/^[A-Z].+\.$/) };
    expect([made!.event, successor!.event, others]).toEqual(["key made", "key made", []]);
    const about = { client_id: "client", scope: "api1", kid: made!["kid"], jti };
    expect(issued).toEqual({ ...request, event: "token issued", ...about });
    const asWhom = { client_id: "client", error: "invalid_client" };
    expect(refused).toEqual({ ...why, event: "token refused", ...asWhom });
    const call = { ...why, event: "call refused", error: "no_credentials" };
    expect(protectedApi.lines).toEqual([call]);
    for (const { milliseconds } of [issued!, refused!, ...protectedApi.lines])
      expect(Number.isInteger(milliseconds)).toBe(true);
  });
});

// --- Request data in the log ---------------------------------------------------------------------

describe("what the log tells of a request", async () => {
  const lines: string[] = [];
  const log = { write: (line: string) => void lines.push(line), flush: () => {} };
  const clientKey = await key();
  const app = { ...registration, client_id: "app", jwks: { keys: [clientKey.publicJwk] } };
  const { url, tokenEndpoint } = await idp({ log, clients: [registration, app] });
  const issuer = new Issuer([issuerKey]);
  const identity = (await api(issuer.url, { log })).url;

  const asserted = { client_assertion_type: assertionType };
  const token = (body: Record<string, string> | string, headers = {}) =>
    post(tokenEndpoint, body, headers);
  const withAssertion = (client_assertion: string) =>
    token({ ...right, ...{ client_id: "", client_secret: "" }, client_assertion, ...asserted });
  const assert = async (claims = {}, header = {}) =>
    withAssertion(await assertion(clientKey, "app", url, claims, header));
  const prove = async (claims = {}) =>
    token(right, { dpop: await proof(clientKey, "POST", tokenEndpoint, undefined, claims) });
  const call = (authorization: string) =>
    send(`${identity}/identity`, { headers: { authorization } });
  const callWith = async (claims = {}) =>
    call(`Bearer ${await accessToken(issuerKey, issuer.url, identity, claims)}`);

  const hostile = [
    ...['\n{"event":"token issued"}', "\r", '","event":"token issued","a":"', '\\","b":"\\'],
    ...["\x1b[2J\x1b[1;1H", "\x9b2J", "\x7f\x85"], // a terminal obeys these
    ...["\u2028\u2029", "\u202E\u2066\u2069", "\u200b\u2000\u206f", "a".repeat(3_000)],
  ];
  const carriers: [name: string, request: (text: string) => Promise<unknown>][] = [
    ["grant_type", (text) => token({ ...right, grant_type: text })],
    ["scope", (text) => token({ ...right, scope: `api1 ${text}` })],
    ["typ of an assertion", (typ) => assert({}, { typ })],
    ["iss of an assertion", (iss) => assert({ iss })],
    ["htu of a proof", (htu) => prove({ htu })],
    ["htm of a proof", (htm) => prove({ htm })],
    ["iss of a token", (iss) => callWith({ iss })],
    ["scope of a token", (scope) => callWith({ scope })],
    ["client_id of a token", (client_id) => callWith({ client_id, scope: "other" })],
  ];
  test.each(carriers)("%s forges nothing: one bounded, harmless line", async (_, request) => {
    for (const text of hostile) {
      lines.length = 0;
      await request(`begin${text}`);
      expect(lines.length).toBe(1);
      expect(lines[0]).toMatch(/^[^\0-\x1F\x7F-\x9F\u2000-\u206F]{10,5000}\n$/);
      const entry = JSON.parse(lines[0]!);
      expect(Object.keys(entry)).not.toContain("b");
      expect(entry.event).toMatch(/^(token|call) refused$/);
      expect(lines[0]).toContain("begin"); // it did get there
    }
  });
});

// --- Unexpected failures -------------------------------------------------------------------------

describe("an unexpected failure → a constant 500, the cause in the log alone, and it goes on", () => {
  const cause = "the clock of /etc/secret broke";
  const rows: [Kind, path: string, init: BunFetchRequestInit][] = [
    ["idp", "/connect/token", { method: "POST", body: new URLSearchParams(right) }],
    ["idp", "/.well-known/openid-configuration/jwks", {}],
    ["api", "/health", {}],
    ["api", "/identity", { headers: { authorization: "Bearer a.b.c" } }],
  ];
  test.each(rows)("%s.ts, %s", async (kind, path, init) => {
    let isBroken = false;
    const clock = () => {
      if (isBroken) throw new Error(cause);
      return Date.now();
    };
    const issuer = new Issuer([issuerKey]);
    const server = kind === "idp" ? await idp({ clock }) : await api(issuer.url, { clock });
    const before = server.lines.length;
    isBroken = true;
    const { status, text, headers } = await send(server.url + path, init);
    expect([status, text]).toEqual([500, "Internal Server Error"]);
    expect([headers.get("cache-control"), headers.get("pragma")]).toEqual(["no-store", "no-cache"]);
    const lines = server.lines.slice(before);
    expect(lines.map(({ event }) => event)).toEqual(["failure"]);
    expect(lines[0]!["reason"]).toContain(cause);
    expect(lines[0]!["reason"].length).toBeLessThanOrEqual(2_000);
    isBroken = false;
    expect((await send(server.url + path, init)).status).not.toBe(500);
    await server.stop();
  });
});
