/** How the servers start and stop, and what they log: nothing lost, nothing forged, nothing told. */

import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, constants, openSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { eventually } from "../support/databases.ts";
import { type Answer, basic, post, send } from "../support/http.ts";
import { accessToken, assertion, assertionType, Issuer, key, proof } from "../support/jwt.ts";
import { launch, launchWith, Program, root, temporaryDirectory } from "../support/programs.ts";
import { urlOf } from "../support/programs.ts";
import { api, idp, pair, resource } from "../support/servers.ts";

setDefaultTimeout(20_000); // most of it runs at the same time

const clientSecrets = [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }]; // "secret"
const registration = {
  client_id: "client",
  client_secrets: clientSecrets,
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 3600,
};
const right = { grant_type: "client_credentials", client_id: "client", client_secret: "secret" };
const local = { ISSUER: "http://127.0.0.1:0", API_URL: "http://127.0.0.1:0" };
const issuerKey = await key();

/** A kept connection, on which the test says byte for byte what is sent, and when. */
class Connection {
  #received = "";
  #isOpen = true;
  #socket: Bun.Socket | undefined;

  static async to(url: string): Promise<Connection> {
    const connection = new Connection();
    const { hostname, port } = new URL(url);
    const socket = {
      data: (_: unknown, chunk: Buffer) => void (connection.#received += chunk.toString("latin1")),
      close: () => void (connection.#isOpen = false),
    };
    connection.#socket = await Bun.connect({ hostname, port: Number(port), socket });
    return connection;
  }

  send = (text: string) => this.#socket!.write(text);
  end = () => this.#socket!.end();

  /** The next answer, or undefined if the server hangs up without a whole one. */
  async answer(): Promise<{ status: number; closes: boolean } | undefined> {
    while (true) {
      const [, head = "", rest] = /^(.*?)\r\n\r\n(.*)$/s.exec(this.#received) ?? [];
      const length = Number(/^content-length: (\d+)/im.exec(head)?.[1] ?? 0);
      if (rest !== undefined && rest.length >= length) {
        this.#received = rest.slice(length);
        return { status: Number(head.split(" ")[1]), closes: /^connection: close/im.test(head) };
      }
      if (!this.#isOpen) return undefined;
      await Bun.sleep(1);
    }
  }
}

const get = (path: string, fields = "") => `GET ${path} HTTP/1.1\r\nHost: a\r\n${fields}\r\n`;
const form = new URLSearchParams(right).toString();
const postHead = (path: string, length: number) =>
  `POST ${path} HTTP/1.1\r\nHost: a\r\nContent-Length: ${length}\r\n` +
  "Content-Type: application/x-www-form-urlencoded\r\n\r\n";

const isRefused = (url: string) =>
  Connection.to(url).then(
    (connection) => void connection.end(),
    () => true,
  );

// --- Starting ------------------------------------------------------------------------------------

describe("starting", () => {
  test("two servers with different settings run in one process, and stop alone", async () => {
    const tenant = { ...registration, client_id: "tenant", access_token_lifetime_seconds: 60 };
    const [first, second] = [await idp(), await idp({ clients: [tenant] })];
    const asTenant = { ...right, client_id: "tenant" };
    const ask = async (url: string, body: Record<string, string>) => {
      const { status, json } = await post(url, body);
      return [status, json.expires_in];
    };
    expect(await ask(first.tokenEndpoint, right)).toEqual([200, 3600]);
    expect(await ask(second.tokenEndpoint, asTenant)).toEqual([200, 60]);
    expect(await ask(first.tokenEndpoint, asTenant)).toEqual([401, undefined]);
    expect(await ask(second.tokenEndpoint, right)).toEqual([401, undefined]);
    const kids = new Set([...first.lines, ...second.lines].map(({ kid }) => kid));
    expect(kids.size).toBe(4 + 1); // two keys each, and none in a refusal
    await first.stop();
    expect(await isRefused(first.url)).toBe(true);
    expect(await ask(second.tokenEndpoint, asTenant)).toEqual([200, 60]);
    const events = second.lines.map(({ event, client_id }) => `${event} ${client_id}`).slice(2);
    const issued = "token issued tenant";
    expect(events).toEqual([issued, "token refused undefined", issued]);
    await second.stop();
  });

  test("two servers share a port where both have reusePort, and only there", async () => {
    const first = await idp({ reusePort: true });
    await expect(idp({ issuer: first.url })).rejects.toThrow();
    const second = await idp({ issuer: first.url, reusePort: true });
    await first.stop();
    expect((await send(`${second.url}/health`)).status).toBe(200);
    await second.stop();
    const issuer = { issuer: "http://127.0.0.1:9" };
    const third = await api(issuer.issuer, { reusePort: true });
    await expect(api(issuer.issuer, { resource: third.url })).rejects.toThrow();
    await (await api(issuer.issuer, { resource: third.url, reusePort: true })).stop();
    await third.stop();
  });

  test.concurrent("importing the four files does nothing: no output, no file, no end", async () => {
    const cwd = temporaryDirectory();
    const files = ["config", "idp", "api", "client"].map((name) => join(root, `${name}.ts`));
    const script = files.map((file) => `await import("${file}");`).join("\n");
    const command = [process.execPath, "--eval", `${script}\nconsole.log("imported");`];
    const program = new Program(command, cwd);
    const ended = [await program.ended(), program.stdout, program.stderr, readdirSync(cwd)];
    expect(ended).toEqual([0, "imported\n", "", []]);
  });

  for (const program of ["idp", "api"] as const) {
    test.concurrent(
      `${program}.ts, port in use → one line that names it, exit code 1`,
      async () => {
        const taken = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response() });
        const url = taken.url.origin;
        const second = launch(program, { env: { ISSUER: url, API_URL: url, LOG: "off" } });
        expect([await second.ended(), second.stdout]).toEqual([1, ""]);
        expect(second.stderr).toMatch(new RegExp(`^error: [^\n]*\\b${taken.port}\\b[^\n]*\n$`));
        await taken.stop(true);
      },
    );
  }
});

// --- Stopping ------------------------------------------------------------------------------------

type Kind = "idp" | "api";

/** Starts a server as a program, with a request that it lets in and one that it does not. */
async function started(kind: Kind, drainSeconds?: number) {
  const issuer = new Issuer([issuerKey]);
  const env = kind === "idp" ? local : { ...local, ISSUER: issuer.url };
  const changes = { authorizationServer: { drainSeconds }, resourceServer: { drainSeconds } };
  const program = drainSeconds
    ? launchWith(kind, changes as never, { env })
    : launch(kind, { env });
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
    ["idp", "SIGINT"],
    ["api", "SIGTERM"],
    ["api", "SIGINT"],
  ];
  test.concurrent.each(underLoad)(
    "%s.ts, %s under load → every request on kept connections is answered and logged, exit code 0",
    async (kind, signal) => {
      const { program, url, requests } = await started(kind);
      const statuses: [right: unknown[], wrong: unknown[]] = [[], []];
      const work = async (first: number) => {
        const connection = await Connection.to(url);
        for (let turn = first; ; turn = 1 - turn) {
          connection.send(requests[turn]!);
          const answer = await connection.answer();
          statuses[turn]!.push(answer?.status);
          if (!answer || answer.closes) return connection.end();
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
    },
  );

  const ask = (body: Record<string, string>) => ({
    method: "POST",
    body: new URLSearchParams(body),
  });
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
    ["idp", "SIGTERM", "SIGINT"],
    ["api", "SIGINT", "SIGTERM"],
    ["idp", "SIGTERM", "SIGTERM"],
  ];
  test.concurrent.each(twice)(
    "%s.ts, %s → /health 503 and Connection: close on every answer; %s → exit code 1 at once",
    async (kind, first, second) => {
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
      program.process.kill(first);
      await eventually("it drains", async () => (await health()).status === 503);
      const draining = await health();
      const fields = ["cache-control", "connection"].map((name) => draining.headers.get(name));
      expect([draining.json, ...fields]).toEqual([{ status: "unavailable" }, "no-store", "close"]);
      await requireAnswers(true);
      program.process.kill(second);
      expect([await program.ended(), program.process.signalCode]).toEqual([1, null]);
    },
  );

  test.concurrent(
    "a log that never arrives, or fails, does not keep a server from stopping",
    async () => {
      const flushes = [
        () => Promise.withResolvers().promise,
        () => Promise.reject(new Error("closed")),
      ];
      const servers = flushes.map((flush) => idp({ log: { write: () => {}, flush } }));
      for (const server of await Promise.all(servers)) await server.stop();
    },
  );
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
    import { authorizationServer, stopOnSignal } from "${join(root, "config.ts")}";
    import { start } from "${join(root, "idp.ts")}";
    const running = await start({ ...authorizationServer, ...${settings} });
    stopOnSignal(running);
    await Bun.write("url", running.url);`;
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

  test.concurrent(
    "a reader that stops reading holds up no request, and gets whole lines",
    async () => {
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
    },
  );

  test.concurrent("a reader that ends does not end the server", async () => {
    const pipe = new Pipe();
    const { program, issue } = await redirected(`> '${pipe.path}'`);
    pipe.close();
    for (let sent = 0; sent < 15; sent++) expect(await issue()).toBe(200);
    expect([await program.stop("SIGTERM"), program.stderr]).toEqual([0, ""]);
  });

  test.concurrent(
    "without stdout and stderr it serves, and no file of its own gets the log",
    async () => {
      const { program, issue, cwd } = await redirected(">&- 2>&-");
      expect(await issue()).toBe(200);
      expect(await program.stop("SIGTERM")).toBe(0);
      for (const file of readdirSync(join(cwd, "keys")))
        expect(await Bun.file(join(cwd, "keys", file)).text()).not.toContain("token issued");
    },
  );
});

describe("answers under way while stopping", () => {
  test("idp.ts, a request whose body is still on its way → answered", async () => {
    const server = await idp();
    const slow = await Connection.to(server.url);
    slow.send(postHead("/connect/token", form.length) + form.slice(0, 20));
    await send(`${server.url}/health`);
    const stopped = server.stop();
    await eventually("nobody listens", () => isRefused(server.url));
    slow.send(form.slice(20));
    expect(await slow.answer()).toEqual({ status: 200, closes: true });
    await stopped;
    expect(server.lines.at(-1)!.event).toBe("token issued");
  });

  test("api.ts, a call that waits for the issuer's keys → answered", async () => {
    const issuer = new Issuer([issuerKey]);
    const gate = Promise.withResolvers<void>();
    issuer.answer = () => gate.promise as Promise<never>; // then it answers as ever
    const server = await api(issuer.url);
    const slow = await Connection.to(server.url);
    const token = await accessToken(issuerKey, issuer.url, server.url);
    slow.send(get("/identity", `Authorization: Bearer ${token}\r\n`));
    await eventually("the keys are asked for", () => issuer.requests.length > 0);
    const stopped = server.stop();
    await eventually("nobody listens", () => isRefused(server.url));
    gate.resolve();
    expect(await slow.answer()).toEqual({ status: 200, closes: true });
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
    const time = expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    const { kid } = made!;
    const { jti } = JSON.parse(
      Buffer.from(json.access_token.split(".")[1], "base64url").toString(),
    );
    const request = { time, address: "127.0.0.1", milliseconds: expect.any(Number) };
    expect([made!.event, successor!.event, others]).toEqual(["key made", "key made", []]);
    expect(new Date(`${made!["time"]}`).getTime()).toBeLessThanOrEqual(Date.now());
    const about = { client_id: "client", scope: "api1", kid, jti };
    expect(issued).toEqual({ ...request, event: "token issued", ...about });
    const reason = expect.stringMatching(/^[A-Z].+\.$/);
    const why = { client_id: "client", error: "invalid_client", reason };
    expect(refused).toEqual({ ...request, event: "token refused", ...why });
    const call = { ...request, event: "call refused", error: "no_credentials", reason };
    expect(protectedApi.lines).toEqual([call]);
    for (const { milliseconds } of [issued!, refused!, ...protectedApi.lines])
      expect(Number.isInteger(milliseconds)).toBe(true);
  });

  test("1,048,576 characters may wait; what is dropped then is counted in the next line", async () => {
    const maximum = 1_048_576;
    /** The lines, and of those that the test keeps waiting, how to let them go. */
    const written: { text: string; waiting: PromiseWithResolvers<void> | undefined }[] = [];
    let keepsWaiting = (_text: string) => false;
    const write = (text: string) => {
      const waiting = keepsWaiting(text) ? Promise.withResolvers<void>() : undefined;
      written.push({ text, waiting });
      return waiting?.promise;
    };
    const server = await idp({ log: { write, flush: () => {} }, ...verbose(maximum - 450) });
    const waitingCharacters = () =>
      written.reduce((sum, { text, waiting }) => sum + (waiting ? text.length : 0), 0);
    /** Logs a line, longer each time, up to a hundred characters more. */
    const fill = async () => {
      const grant_type = `x${"x".repeat(written.length % 100)}`;
      expect((await post(server.tokenEndpoint, { ...right, grant_type })).status).toBe(400);
    };
    keepsWaiting = (text) => text.length > maximum / 2;
    expect((await post(server.tokenEndpoint, right)).status).toBe(200);
    const missing = maximum - waitingCharacters();
    expect(missing).toBeGreaterThan(200);
    keepsWaiting = ({ length }) => waitingCharacters() + length === maximum;
    while (waitingCharacters() < maximum) await fill();
    // Exactly as much as may wait: the next line is taken, and the two after that are not.
    keepsWaiting = () => true;
    const before = written.length;
    for (let sent = 0; sent < 3; sent++) await fill();
    expect(written.length).toBe(before + 1);
    const [first, ...rest] = written.filter(({ waiting }) => waiting);
    first!.waiting!.reject(new Error("closed"));
    for (const { waiting } of rest) waiting!.resolve();
    await Bun.sleep(0);
    keepsWaiting = () => false;
    await fill();
    await fill();
    const dropped = written.map(({ text }) => JSON.parse(text).dropped);
    expect(dropped.slice(before)).toEqual([undefined, 2, undefined]);
    expect(dropped.slice(0, before).every((count) => count === undefined)).toBe(true);
    await server.stop();
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

  const token = (body: Record<string, string> | string, headers = {}) =>
    post(tokenEndpoint, body, headers);
  const withAssertion = (client_assertion: string) =>
    token({ ...right, ...{ client_id: "", client_secret: "" }, client_assertion, ...asserted });
  const asserted = { client_assertion_type: assertionType };
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
  test.each(carriers)(
    "%s forges nothing: one line, bounded, that moves no cursor",
    async (_, request) => {
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
    },
  );

  const secret = "correct-horse-battery-staple";
  const basicField = (id: string, word: string) => ({ authorization: basic(id, word) });
  const unsigned = (jwt: string) => jwt.replace(/[^.]+$/, secret);
  const misplaced: [name: string, request: () => Promise<Answer>][] = [
    ["Basic, wrong", () => token({}, basicField("client", secret))],
    ["Basic, as the id", () => token({}, basicField(secret, "client"))],
    ["Basic, not encoded", () => token({}, { authorization: `Basic ${secret}` })],
    ["Basic without a colon", () => token({}, { authorization: `Basic ${btoa(secret)}` })],
    ["Basic with bad percent-encoding", () => token({}, basicField(`%zz${secret}`, secret))],
    ["the scheme", () => token({}, { authorization: secret })],
    ["client_secret", () => token({ ...right, client_secret: secret })],
    ["client_secret twice", () => token(`client_secret=${secret}&client_secret=${secret}`)],
    ["client_secret with bad percent-encoding", () => token(`client_secret=%zz${secret}`)],
    ["two methods", () => token({ client_secret: secret }, basicField("client", secret))],
    ["client_id", () => token({ ...right, client_id: secret })],
    ["a parameter of its own", () => token({ ...right, [secret]: secret, scope: "other" })],
    ["the query", () => send(`${tokenEndpoint}?client_secret=${secret}`, { method: "POST" })],
    ["an assertion", () => withAssertion(secret)],
    ["a signature", async () => withAssertion(unsigned(await assertion(clientKey, "app", url)))],
    ["a proof", () => token(right, { dpop: secret })],
    ["a token", () => call(`Bearer ${secret}`)],
    ["two tokens", () => call(`Bearer ${secret}, Bearer ${secret}`)],
    ["a token in the query", () => send(`${identity}/identity?access_token=${secret}`)],
    [
      "a token's signature",
      async () => call(`Bearer ${unsigned(await accessToken(issuerKey, issuer.url, identity))}`),
    ],
  ];
  test.each(misplaced)("a secret as %s neither comes back nor is logged", async (_, request) => {
    lines.length = 0;
    const { status, text, headers } = await request();
    expect([status >= 400, lines.length]).toEqual([true, 1]);
    const told = [text, JSON.stringify(headers.toJSON()), ...lines].join();
    for (const form of [secret, btoa(secret)]) expect(told).not.toContain(form);
  });

  test("no token, assertion or proof is logged, whether accepted or refused", async () => {
    lines.length = 0;
    const jwt = await assertion(clientKey, "app", url);
    const dpop = await proof(clientKey, "POST", tokenEndpoint);
    const other = await accessToken(issuerKey, issuer.url, identity, { scope: "other" });
    const answers = [await withAssertion(jwt), await withAssertion(jwt)];
    answers.push(await token(right, { dpop }), await token(right, { dpop }));
    answers.push(await call(`Bearer ${other}`));
    expect(answers.map(({ status }) => status)).toEqual([200, 401, 200, 400, 403]);
    const issued = answers.flatMap(({ json }) => json?.access_token ?? []);
    const parts = [jwt, dpop, other, ...issued].flatMap((text) => text.split("."));
    expect([lines.length, parts.length]).toEqual([5, 15]);
    expect(parts.filter((part) => lines.join("").includes(part))).toEqual([]);
  });
});

// --- Unexpected failures -------------------------------------------------------------------------

describe("an unexpected failure → a constant 500, the cause in the log alone, and it goes on", () => {
  const cause = "the clock of /etc/secret broke";
  const rows: [Kind, path: string, init: BunFetchRequestInit][] = [
    ["idp", "/connect/token", { method: "POST", body: new URLSearchParams(right) }],
    ["idp", "/.well-known/openid-configuration/jwks", {}],
    ["idp", "/health", {}],
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
    const answer = await send(server.url + path, init);
    expect([answer.status, answer.text]).toEqual([500, "Internal Server Error"]);
    const fields = [answer.headers.get("cache-control"), answer.headers.get("pragma")];
    expect(fields).toEqual(["no-store", "no-cache"]);
    const [failure, ...others] = server.lines.slice(before);
    expect([failure!.event, failure!["reason"].includes(cause), others]).toEqual([
      "failure",
      true,
      [],
    ]);
    expect(failure!["reason"].length).toBeLessThanOrEqual(2_000);
    isBroken = false;
    expect((await send(server.url + path, init)).status).not.toBe(500);
    await server.stop();
  });
});
