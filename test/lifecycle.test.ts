/** How the servers stop, and what they log: nothing is lost, nothing is forged, nothing is told. */

import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, constants, openSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import type { ClientRegistration } from "../config.ts";
import { captureLog, cleanUp, eventually, freeOrigin, launch, Program } from "./support.ts";
import { root, signedJwt, temporaryDirectory, withModule } from "./support.ts";

setDefaultTimeout(15_000); // most of it runs at the same time
afterAll(cleanUp);

type Signal = "SIGTERM" | "SIGINT";
type Idp = typeof import("../idp.ts");

// --- Requests ------------------------------------------------------------------------------------

interface Answer {
  status: number;
  headers: Headers;
  body: string;
}

/** A kept-alive connection, on which the answers are counted out by their Content-Length. */
class Connection {
  #received = "";
  #open = true;
  #changed = Promise.withResolvers<void>();
  #socket: Bun.Socket | undefined;

  /** Rejects when nobody listens. */
  static async to(origin: string): Promise<Connection> {
    const { hostname, port } = new URL(origin);
    const connection = new Connection();
    const change = () => {
      connection.#changed.resolve();
      connection.#changed = Promise.withResolvers();
    };
    connection.#socket = await Bun.connect({
      hostname,
      port: Number(port),
      socket: {
        data(_, chunk) {
          connection.#received += chunk.toString("latin1");
          change();
        },
        close() {
          connection.#open = false;
          change();
        },
      },
    });
    return connection;
  }

  send(text: string): void {
    this.#socket!.write(text);
  }

  end(): void {
    this.#socket!.end();
  }

  /** Waits until the server hangs up. */
  async closed(): Promise<void> {
    while (this.#open) await this.#changed.promise;
  }

  /** The next answer, or undefined if the server hangs up without a whole one. */
  async answer(): Promise<Answer | undefined> {
    for (;;) {
      const [head, ...rest] = this.#received.split("\r\n\r\n");
      const [line, ...fields] = head!.split("\r\n");
      const headers = new Headers(
        fields.map((field) => field.split(/: (.*)/).slice(0, 2) as [string, string]),
      );
      const length = Number(headers.get("content-length") ?? 0);
      const body = rest.join("\r\n\r\n");
      if (rest.length && body.length >= length) {
        this.#received = body.slice(length);
        return { status: Number(line!.split(" ")[1]), headers, body: body.slice(0, length) };
      }
      if (!this.#open) return undefined;
      await this.#changed.promise;
    }
  }
}

/** One request on a connection of its own. */
async function once(origin: string, request: string): Promise<Answer | undefined> {
  const connection = await Connection.to(origin);
  connection.send(request);
  return await connection.answer().finally(() => connection.end());
}

const get = (path: string, fields = "") => `GET ${path} HTTP/1.1\r\nHost: a\r\n${fields}\r\n`;
const form = "grant_type=client_credentials&client_id=client&client_secret=secret";
const post = (body: string, length = body.length) =>
  "POST /connect/token HTTP/1.1\r\nHost: a\r\n" +
  `Content-Type: application/x-www-form-urlencoded\r\nContent-Length: ${length}\r\n\r\n${body}`;

/** Waits until nobody listens at `origin`. */
const refused = (origin: string) =>
  eventually(`${origin} refuses connections`, () =>
    Connection.to(origin).then(
      (connection) => connection.end(),
      () => true,
    ),
  );

const linesOf = (text: string) => text.split("\n").filter(Boolean);

// --- Servers -------------------------------------------------------------------------------------

const issuerKey = await jose.generateKeyPair("ES256");
const jwk = { ...(await jose.exportJWK(issuerKey.publicKey)), kid: "1", alg: "ES256", use: "sig" };

/** An issuer whose keys are had once `gate` is open; `asked` tells that somebody wants them. */
class Issuer {
  readonly asked = Promise.withResolvers<void>();
  readonly gate = Promise.withResolvers<void>();
  readonly server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    fetch: async ({ url }) => {
      this.asked.resolve();
      await this.gate.promise;
      const jwks_uri = `${this.origin}/jwks`;
      return Response.json(url === jwks_uri ? { keys: [jwk] } : { issuer: this.origin, jwks_uri });
    },
  });

  get origin(): string {
    return this.server.url.origin;
  }

  async bearer(resource: string, changes = {}): Promise<string> {
    const now = Math.floor(Date.now() / 1000);
    const dates = { iat: now, nbf: now, exp: now + 600, jti: "jti" };
    const about = { iss: this.origin, aud: resource, sub: "client", client_id: "client" };
    const claims = { ...about, scope: "api1", ...dates, ...changes };
    const header = { alg: "ES256", typ: "at+jwt", kid: "1" };
    return `Authorization: Bearer ${await signedJwt(header, claims, issuerKey.privateKey)}\r\n`;
  }
}

async function startIdp(env: Record<string, string> = {}) {
  const origin = freeOrigin();
  const cwd = temporaryDirectory();
  const program = launch("idp", { cwd, env: { ISSUER: origin, ...env } });
  await program.printed(/^authorization server: /);
  return { origin, program, cwd, served: `authorization server: ${origin}\n` };
}

async function startApi() {
  const issuer = new Issuer();
  const origin = freeOrigin();
  const program = launch("api", { env: { ISSUER: issuer.origin, API_URL: origin } });
  await program.printed(/^API: /);
  return { origin, program, issuer, served: `API: ${origin}\n` };
}

/** Starts a server with requests for it: one that is let in, and one that is not. */
const kinds = {
  "idp.ts": async () => {
    const server = await startIdp();
    const requests = [post(form), post(form.replace("=secret", "=wrong"))];
    const events = ["token issued", "token refused"];
    return { ...server, requests, statuses: [200, 401], events };
  },
  "api.ts": async () => {
    const server = await startApi();
    server.issuer.gate.resolve();
    const requests = [
      get("/identity", await server.issuer.bearer(server.origin)),
      get("/identity"),
    ];
    return { ...server, requests, statuses: [200, 401], events: [undefined, "call refused"] };
  },
};
type Kind = keyof typeof kinds;

// --- Stopping ------------------------------------------------------------------------------------

describe("stopping", () => {
  const rows: [Kind, Signal][] = [
    ["idp.ts", "SIGTERM"],
    ["idp.ts", "SIGINT"],
    ["api.ts", "SIGTERM"],
    ["api.ts", "SIGINT"],
  ];

  test.concurrent.each(rows)(
    "%s, %s under load → every request on kept-alive connections is answered and logged",
    async (kind, signal) => {
      const { origin, program, requests, statuses, events, served } = await kinds[kind]();
      let count = 0;
      const wrong: unknown[] = [];
      const counts = [0, 0];
      const work = async (first: number) => {
        const connection = await Connection.to(origin);
        for (let turn = first; ; turn = 1 - turn) {
          connection.send(requests[turn]!);
          const answer = await connection.answer();
          count += 1;
          counts[turn]! += 1;
          if (answer?.status !== statuses[turn]) wrong.push(answer);
          if (answer?.headers.get("connection") !== "close" && answer) continue;
          return await connection.closed();
        }
      };
      const working = [0, 1, 0, 1].map(work);
      await eventually("some answers", () => count > 20);
      program.process.kill(signal);
      await Promise.all(working);
      expect(wrong).toEqual([]);
      expect(await program.ended()).toBe(0);
      expect(program.stderr).toBe(served);
      const logged = linesOf(program.stdout).map((line) => JSON.parse(line).event);
      for (const [turn, event] of events.entries()) {
        const lines = logged.filter((name) => name === event);
        expect([event, lines.length]).toEqual([event, event ? counts[turn]! : 0]);
      }
      expect(logged.filter((name) => !events.includes(name))).toEqual([]);
    },
  );

  const documents = {
    "idp.ts": [
      get("/.well-known/openid-configuration"),
      get("/.well-known/openid-configuration/jwks"),
      post("grant_type=password"),
      post(form),
      get("/connect/token"),
      get("/nothing"),
      get("/health"),
    ],
    "api.ts": [
      get("/.well-known/oauth-protected-resource"),
      get("/identity"),
      get("/nothing"),
      get("/identity").replace("GET", "PUT"),
      get("/health"),
    ],
  };

  test.concurrent.each(["idp.ts", "api.ts"] as const)(
    "%s, while stopping → /health 503 and Connection: close on every answer, not before",
    async (kind) => {
      const { origin, program, requests } = await kinds[kind]();
      expect((await once(origin, requests[0]!))?.status).toBe(200); // the API has keys now
      for (const request of documents[kind]) {
        const answer = await once(origin, request);
        expect([request, answer!.headers.get("connection")]).not.toContain("close");
      }
      const healthy = await once(origin, get("/health"));
      expect([healthy?.status, healthy?.body]).toEqual([200, '{"status":"ok"}']);
      program.process.kill("SIGTERM");
      const health = await eventually("/health is not 200", async () => {
        const answer = await once(origin, get("/health"));
        return answer?.status === 200 ? undefined : [answer?.status, answer?.body];
      });
      expect(health).toEqual([503, '{"status":"unavailable"}']);
      for (const request of documents[kind]) {
        const answer = await once(origin, request);
        expect([request, answer?.headers.get("connection")]).toEqual([request, "close"]);
      }
      expect(await program.ended()).toBe(0);
    },
  );

  test.concurrent("idp.ts, a request whose body is still on its way → answered", async () => {
    const { origin, program } = await startIdp();
    const slow = await Connection.to(origin);
    slow.send(post(form.slice(0, 30), form.length));
    await once(origin, get("/health"));
    program.process.kill("SIGTERM");
    await refused(origin);
    slow.send(form.slice(30));
    const answer = await slow.answer();
    expect([answer?.status, answer?.headers.get("connection")]).toEqual([200, "close"]);
    await slow.closed();
    expect(await program.ended()).toBe(0);
    expect(program.log.map(({ event }) => event)).toEqual(["token issued"]);
  });

  test.concurrent("api.ts, a call that waits for the issuer's keys → answered", async () => {
    const { origin, program, issuer } = await startApi();
    const slow = await Connection.to(origin);
    slow.send(get("/identity", await issuer.bearer(origin)));
    await issuer.asked.promise;
    program.process.kill("SIGTERM");
    await refused(origin);
    issuer.gate.resolve();
    const answer = await slow.answer();
    expect([answer?.status, answer?.headers.get("connection")]).toEqual([200, "close"]);
    expect(await program.ended()).toBe(0);
  });

  const twice: [Signal, Signal][] = [
    ["SIGTERM", "SIGINT"],
    ["SIGINT", "SIGTERM"],
    ["SIGTERM", "SIGTERM"],
  ];
  test.concurrent.each(twice)("%s, then %s → exit code 1 at once", async (first, second) => {
    const { origin, program } = await startIdp();
    const slow = await Connection.to(origin);
    slow.send(post("", 10));
    await once(origin, get("/health"));
    program.process.kill(first);
    await eventually("stopping", async () => (await once(origin, get("/health")))?.status === 503);
    program.process.kill(second);
    expect(await slow.answer()).toBeUndefined();
    expect(await program.ended()).toBe(1);
  });

  test.concurrent("a request that never ends does not keep the server from stopping", async () => {
    const { origin, program } = await startIdp();
    const slow = await Connection.to(origin);
    slow.send(post("", 10_000));
    const dripping = setInterval(() => slow.send("a"), 200);
    await once(origin, get("/health"));
    expect(await program.stop("SIGTERM")).toBe(0);
    clearInterval(dripping);
    expect(await slow.answer()).toBeUndefined();
  });
});

// --- Log -----------------------------------------------------------------------------------------

/** A program that logs what it is asked to by GET /<lines>/<bytes of a line>, several pairs at once. */
const chatter = join(temporaryDirectory(), "chatter.ts");
writeFileSync(
  chatter,
  `import { log, stopOnSignal } from "${root}/config.ts";
  function write(path) {
    const frame = '{"time":"2000-01-01T00:00:00.000Z","event":"line","text":""}\\n'.length;
    for (const [, lines, bytes] of path.matchAll(/(\\d+)\\/(\\d+)/g)) {
      for (let n = 0; n < lines; n++) log("line", { text: "x".repeat(bytes - frame) });
    }
    return new Response();
  }
  const fetch = ({ url }) => write(new URL(url).pathname);
  const server = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch });
  process.on("SIGTERM", () => log("signal", {}));
  stopOnSignal(server, async () => write(process.env.LAST));
  console.error(server.url.origin);`,
);

async function startChatter(env: Record<string, string> = {}) {
  const program = new Program([process.execPath, chatter], {
    cwd: temporaryDirectory(),
    env: { LAST: "/1/100", ...env },
  });
  await program.printed(/\n/);
  return { program, origin: program.stderr.trim() };
}

/** A pipe that nobody reads from until `read` is called, or ever if `close` is. */
class Pipe {
  readonly path = join(temporaryDirectory(), "pipe");
  readonly #descriptor: number;

  constructor() {
    expect(Bun.spawnSync(["mkfifo", this.path]).exitCode).toBe(0);
    this.#descriptor = openSync(this.path, constants.O_RDONLY | constants.O_NONBLOCK);
  }

  close = () => closeSync(this.#descriptor);

  read(): Program {
    return new Program(["cat", this.path], { cwd: root, env: { PATH: process.env["PATH"] } });
  }
}

/** Starts idp.ts with a redirection by the shell, such as `> pipe`. */
async function startRedirected(redirection: string) {
  const origin = freeOrigin();
  const cwd = temporaryDirectory();
  const command = `exec '${process.execPath}' '${root}/idp.ts' ${redirection}`;
  const program = new Program(["sh", "-c", command], {
    cwd,
    env: { PATH: process.env["PATH"], ISSUER: origin },
  });
  const health = async () => (await once(origin, get("/health")).catch(() => undefined))?.status;
  await eventually("it serves", async () => (await health()) === 200);
  return { program, origin, cwd };
}

describe("log", () => {
  test.concurrent("idp.ts: one JSON object per token issued or refused, soon", async () => {
    const { origin, program, served } = await startIdp();
    await once(origin, post(form));
    await once(origin, post(form.replace("=secret", "=wrong")));
    await eventually("two lines", () => program.log.length === 2);
    expect(program.stdout.replace(/(.*)\n(.*)\n/, "")).toBe("");
    const [issued, denied] = program.log;
    expect(issued).toEqual({
      ...{ time: expect.any(String), event: "token issued", address: "127.0.0.1" },
      ...{ client_id: "client", scope: "api1", kid: expect.any(String), jti: expect.any(String) },
      milliseconds: expect.any(Number),
    });
    expect(denied).toEqual({
      ...{ time: expect.any(String), event: "token refused", address: "127.0.0.1" },
      ...{ client_id: "client", error: "invalid_client", reason: "wrong secret" },
      milliseconds: expect.any(Number),
    });
    const time = `${issued!["time"]}`;
    expect(new Date(time).toISOString()).toBe(time);
    expect(program.stderr).toBe(served);
  });

  test.concurrent("api.ts: one JSON object per call refused, soon", async () => {
    const { origin, program, issuer, served } = await startApi();
    issuer.gate.resolve();
    await once(origin, get("/identity", await issuer.bearer(origin)));
    await once(origin, get("/identity", await issuer.bearer(origin, { scope: "read" })));
    await program.printed(/\n/, "stdout");
    expect(program.log).toEqual([
      {
        ...{ time: expect.any(String), event: "call refused", address: "127.0.0.1" },
        ...{ client_id: "client", scope: "api1", jti: "jti", error: "insufficient_scope" },
        ...{ reason: "not in the token", milliseconds: expect.any(Number) },
      },
    ]);
    expect([linesOf(program.stdout).length, program.stderr]).toEqual([1, served]);
  });

  test.concurrent("LOG=off silences it", async () => {
    const { origin, program, served } = await startIdp({ LOG: "off" });
    expect((await once(origin, post(form)))?.status).toBe(200);
    expect(await program.stop("SIGTERM")).toBe(0);
    expect([program.stdout, program.stderr]).toEqual(["", served]);
  });

  test.concurrent("what is logged in the last instant is written before the exit", async () => {
    const { origin, program } = await startChatter({ LAST: "/1000/1000" });
    await once(origin, get("/3/100"));
    expect(await program.stop("SIGTERM")).toBe(0);
    const events = program.log.map(({ event }) => event);
    expect(events).toEqual([...Array(3).fill("line"), "signal", ...Array(1000).fill("line")]);
  });

  test.concurrent("a line logged just as the lines before it were written is written", async () => {
    const script = join(temporaryDirectory(), "late.ts");
    writeFileSync(
      script,
      `import { log } from "${root}/config.ts";
      // Logs once more, so many turns of the microtask queue after a write is over.
      const { write } = process.stdout;
      let turns = 0;
      process.stdout.write = (text, done) => write.call(process.stdout, text, async () => {
        done();
        const late = turns;
        turns = 0;
        for (let turn = 1; turn < late; turn++) await undefined;
        if (late) log("late", { late });
      });
      for (const late of [1, 2, 3, 4, 5, 6, 7, 8]) {
        turns = late;
        log("first", {});
        await Bun.sleep(500);
        console.error("round over");
      }`,
    );
    const program = new Program([process.execPath, script], { cwd: root, env: {} });
    for (let late = 1; late <= 8; late++) {
      await program.printed(new RegExp(`^(round over\n){${late}}$`));
      expect(program.log.at(-1)).toMatchObject({ event: "late", late });
    }
    expect(await program.ended()).toBe(0);
  });

  test.concurrent("at most 1 MiB waits, what is dropped is counted in the next line", async () => {
    const { origin, program } = await startChatter();
    let all = 0;
    const logged = async (path: string, lines: number) => {
      await once(origin, get(path));
      const count = () => program.stdout.split("\n").length - 1;
      await eventually(`${lines} lines more`, () => count() === all + lines);
      return program.log.slice(all, (all += lines));
    };
    // 1,024 lines of 1,024 bytes fill it.
    expect((await logged("/3000/1024", 1024)).filter((entry) => entry["dropped"])).toEqual([]);
    expect(program.stdout.length).toBe(1_048_576);
    const [next, after] = await logged("/2/100", 2);
    expect([next!["dropped"], after!["dropped"]]).toEqual([3000 - 1024, undefined]);
    await logged("/1023/1024/1/1025", 1023); // a byte too much
    expect((await logged("/1/100", 1))[0]!["dropped"]).toBe(1);
    expect(await program.stop("SIGTERM")).toBe(0);
    expect(program.log.slice(all).map(({ event }) => event)).toEqual(["signal", "line"]);
  });

  test.concurrent("a reader that stops reading blocks no request", async () => {
    const pipe = new Pipe();
    const { program, origin } = await startRedirected(`> '${pipe.path}'`);
    // A proof whose reason makes a long line.
    const name = "x".repeat(1_500);
    const header = { alg: "ES256", typ: "dpop+jwt", crit: [name], [name]: 1 };
    const proof = `${Buffer.from(JSON.stringify(header)).toString("base64url")}.e30.x`;
    const request = post(form).replace("\r\n\r\n", `\r\nDPoP: ${proof}\r\n\r\n`);
    const each = 400;
    const work = async () => {
      const connection = await Connection.to(origin);
      for (let sent = 0; sent < each; sent++) {
        connection.send(request);
        expect((await connection.answer())?.status).toBe(400);
      }
      connection.end();
    };
    await Promise.all([work(), work(), work(), work()]);
    const reader = pipe.read();
    await reader.printed(/\n/, "stdout");
    pipe.close();
    await eventually("room for a line again", async () => {
      await once(origin, post(form));
      return /token issued.*\n/.test(reader.stdout);
    });
    expect(await program.stop("SIGTERM")).toBe(0);
    expect(await reader.ended()).toBe(0);
    const entries = linesOf(reader.stdout).map((line) => JSON.parse(line));
    const written = entries.filter(({ event }) => event === "token refused");
    const dropped = entries.reduce((sum, entry) => sum + (entry.dropped ?? 0), 0);
    expect(written.length).toBeGreaterThan(600); // 1 MiB of them
    expect(dropped).toBeGreaterThan(0);
    const issued = entries.filter(({ event }) => event === "token issued").length;
    expect(written.length + dropped + issued).toBeGreaterThanOrEqual(4 * each + 1);
  });

  test.concurrent("a reader that ends does not end the server", async () => {
    const pipe = new Pipe();
    const { program, origin } = await startRedirected(`> '${pipe.path}'`);
    pipe.close();
    for (let sent = 0; sent < 100; sent++) {
      expect((await once(origin, post(form)))?.status).toBe(200);
      await Bun.sleep(5);
    }
    expect(await program.stop("SIGTERM")).toBe(0);
    expect(program.stderr).toBe(`authorization server: ${origin}\n`);
  });

  test.concurrent(
    "without stdout and stderr the server works, and its files stay whole",
    async () => {
      const { program, origin, cwd } = await startRedirected(">&- 2>&-");
      expect((await once(origin, post(form)))?.status).toBe(200);
      expect(await program.stop("SIGTERM")).toBe(0);
      expect([program.stdout, program.stderr]).toEqual(["", ""]);
      const database = new Database(join(cwd, "keys/keys.db"));
      expect(database.query("PRAGMA integrity_check").get()).toEqual({ integrity_check: "ok" });
      database.close();
      for (const file of readdirSync(join(cwd, "keys"))) {
        expect(readFileSync(join(cwd, "keys", file), "latin1")).not.toContain("token issued");
      }
    },
  );
});

// --- Request data in the log ---------------------------------------------------------------------

describe("request data in the log", () => {
  /** How the reason begins that tells an unknown name in crit. */
  const prefix = 'Extension Header Parameter "';
  const hostile: [name: string, text: string][] = [
    ["a line feed and a line", '\n{"event":"token issued"}'],
    ["a carriage return", "a\rb"],
    ["a quote that ends the text", '","event":"token issued","a":"'],
    ["a backslash", 'a\\","b":"\\'],
    ["a tab, form feed and vertical tab", "a\tb\fc\vd"],
    ["an escape sequence of a terminal", "\x1b[2J\x1b[1;1H"],
    ["an escape sequence in one character", "\x9b2J"],
    ["delete", "a\x7fb"],
    ["next line, U+0085", "a\x85b"],
    ["line separator, U+2028", "a\u2028b"],
    ["paragraph separator, U+2029", "a\u2029b"],
    ["right-to-left override, U+202E", "a\u202Eb"],
    ["isolates, U+2066 to U+2069", "a\u2066b\u2069"],
    ["two thousand characters", "a".repeat(2_000)],
    ["a surrogate pair at the cut", `${"a".repeat(1_999 - prefix.length)}\u{1F511}b`],
    ["names of the prototype", "__proto__"],
  ];
  /** What ends a line somewhere, or changes what a terminal shows. */
  const tricks = /[\0-\x1F\x7F-\x9F\u2028-\u202E\u2066-\u2069]/;
  /** JSON escapes the first of them; the others are replaced. */
  const told = (text: string) => text.replace(/[\x7F-\x9F\u2028-\u202E\u2066-\u2069]/g, "?");

  const issuer = new Issuer();
  const [origin, resource] = [freeOrigin(), freeOrigin()];
  /** The lines of the log, in the order of `hostile`. */
  const lines = { assertions: [] as string[], proofs: [] as string[], calls: [] as string[] };
  const client_id = "app";
  const clients: ClientRegistration[] = [
    {
      client_id,
      client_secrets: [
        { sha256: new Bun.CryptoHasher("sha256").update("secret").digest("base64") },
      ],
      jwks: { keys: [jwk] },
      grant_types: ["client_credentials"],
      scope: "api1",
      access_token_lifetime_seconds: 3_600,
    },
  ];

  const requestToken = (credentials: Record<string, string>, headers = {}) => {
    const body = new URLSearchParams({ grant_type: "client_credentials", ...credentials });
    return fetch(`${origin}/connect/token`, { method: "POST", headers, body });
  };
  const assertWith = async (text: string) =>
    await requestToken({
      client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
      client_assertion: await signedJwt({ alg: "ES256", crit: [text] }, { sub: client_id }),
    });
  const proveWith = async (text: string) => {
    const dpop = await signedJwt({ alg: "ES256", typ: "dpop+jwt", jwk, crit: [text] }, {});
    return await requestToken({ client_id, client_secret: "secret" }, { dpop });
  };
  const callWith = async (text: string) => {
    const fields = await issuer.bearer(resource, { client_id: text, jti: text, scope: text });
    const authorization = fields.slice("Authorization: ".length, -2);
    return await fetch(`${resource}/identity`, { headers: { authorization } });
  };

  beforeAll(async () => {
    issuer.gate.resolve();
    const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
    const changes = {
      authorizationServer: { issuer: origin, clients, databaseUrl },
      resourceServer: { issuer: issuer.origin, resource },
    };
    const start = (program: "idp" | "api") =>
      withModule(program, changes, (module: Idp) => module.start());
    const servers = [await start("idp"), await start("api"), issuer.server];
    const log = captureLog();
    for (const [, text] of hostile) {
      expect((await assertWith(text)).status).toBe(401);
      expect((await proveWith(text)).status).toBe(400);
      expect((await callWith(text)).status).toBe(403);
    }
    await log.until(3 * hostile.length);
    const all = log.text().split("\n");
    lines.assertions = all.filter((line) => line.includes('"error":"invalid_client"'));
    lines.proofs = all.filter((line) => line.includes('"error":"invalid_dpop_proof"'));
    lines.calls = all.filter((line) => line.includes('"event":"call '));
    log.stop();
    await Promise.all(servers.map((server) => server.stop(true)));
  });

  test("one line for each request", () => {
    for (const each of Object.values(lines)) expect(each).toHaveLength(hostile.length);
  });

  const numbered = hostile.map(([name, text], number) => ({ name, text, number }));

  const refusals = [
    ["an assertion", "invalid_client", () => lines.assertions],
    ["a proof", "invalid_dpop_proof", () => lines.proofs],
  ] as const;
  for (const [jwt, code, logged] of refusals) {
    test.each(numbered)(`crit of ${jwt} with $name → no tricks, cut`, ({ text, number }) => {
      const line = logged()[number]!;
      expect(line).not.toMatch(tricks);
      const { time, milliseconds, ...entry } = JSON.parse(line);
      const reason = told(`${prefix}${text}" is not recognized`.slice(0, 2_000));
      const said = { event: "token refused", address: "127.0.0.1", client_id, error: code, reason };
      expect(entry).toEqual(said);
    });
  }

  test.each(numbered)("token with $name → no tricks", ({ text, number }) => {
    const line = lines.calls[number]!;
    expect(line).not.toMatch(tricks);
    const { event, client_id, jti, error } = JSON.parse(line);
    expect([event, client_id, jti, error]).toEqual([
      ...["call refused", told(text), told(text), "insufficient_scope"],
    ]);
  });
});

// --- What is not told ----------------------------------------------------------------------------

describe("what is not told", () => {
  const [origin, resource] = [freeOrigin(), freeOrigin()];
  const secret = "correct-horse-battery-staple";
  const sha256 = new Bun.CryptoHasher("sha256").update(secret).digest("base64");
  const keyEncryptionSecret = Buffer.alloc(32, "kek").toString("base64url");
  const cwd = temporaryDirectory();
  const scopes = [
    { scope: "api1", description: "My API", resource },
    { scope: "read", description: "Reading", resource },
  ];
  const base = { grant_types: ["client_credentials"], access_token_lifetime_seconds: 3_600 };
  const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
  /** What must not appear. */
  const hidden = new Set([secret, btoa(`client:${secret}`), keyEncryptionSecret]);
  let idp: Program;
  let api: Program;
  let app: CryptoKeyPair;
  let appJwk: jose.JWK;
  let proofJwk: jose.JWK;
  let expected = 0;

  beforeAll(async () => {
    app = (await jose.generateKeyPair("ES256", { extractable: true })) as CryptoKeyPair;
    appJwk = await jose.exportJWK(app.privateKey);
    proofJwk = await jose.exportJWK(app.publicKey);
    hidden.add(appJwk.d!);
    const clients: ClientRegistration[] = [
      { client_id: "client", client_secrets: [{ sha256 }], scope: "api1 read", ...base },
      { client_id: "app", jwks: { keys: [proofJwk] }, scope: "api1", ...base },
    ];
    const env = { ISSUER: origin, API_URL: resource, KEY_ENCRYPTION_SECRET: keyEncryptionSecret };
    idp = launch("idp", { cwd, env, changes: { authorizationServer: { clients, scopes } } });
    api = launch("api", { cwd, env });
    await Promise.all([idp.printed(/^authorization server/), api.printed(/^API/)]);
  });

  /** Keeps a JWT, and each of its parts, from what may appear. */
  function hide(jwt: string): string {
    for (const part of [jwt, ...jwt.split(".")]) if (part.length > 8) hidden.add(part);
    return jwt;
  }
  let jtis = 0;
  const now = () => Math.floor(Date.now() / 1000);
  const encoded = (text: string) => Buffer.from(text).toString("base64url");
  const basic = (text = `client:${secret}`) => {
    hidden.add(btoa(text));
    return { authorization: `Basic ${btoa(text)}` };
  };

  async function assertion(claims = {}, header = {}): Promise<string> {
    const jti = `assertion ${(jtis += 1)}`;
    const valid = { iss: "app", sub: "app", aud: origin, exp: now() + 60, jti };
    return hide(
      await signedJwt({ alg: "ES256", ...header }, { ...valid, ...claims }, app.privateKey),
    );
  }

  async function proof(claims = {}, header = {}): Promise<string> {
    const jti = `proof ${(jtis += 1)}`;
    const valid = { htm: "POST", htu: `${origin}/connect/token`, iat: now(), jti };
    const head = { alg: "ES256", typ: "dpop+jwt", jwk: proofJwk, ...header };
    return hide(await signedJwt(head, { ...valid, ...claims }, app.privateKey));
  }

  /** A JWT with other text in one of its parts. */
  const bent = (jwt: string, part: number, text: string) =>
    hide(jwt.split(".").with(part, text).join("."));

  async function token(
    headers: Record<string, string>,
    body: string | Record<string, string> = {},
  ) {
    const form = typeof body === "string" ? body : new URLSearchParams(body).toString();
    const answer = await fetch(`${origin}/connect/token?client_secret=${secret}`, {
      method: "POST",
      headers: { "content-type": "application/x-www-form-urlencoded", ...headers },
      body: `grant_type=client_credentials&${form}`,
    });
    expected += 1;
    return answer;
  }
  const withAssertion = (jwt: string) =>
    token({}, { client_assertion_type: jwtBearer, client_assertion: jwt });
  const withProof = async (dpop: string) => token({ ...basic(), dpop }, { scope: "api1" });
  const accessToken = async (answer: Response) =>
    hide(((await answer.json()) as { access_token: string }).access_token);
  const call = (authorization: string, headers = {}) =>
    fetch(`${resource}/identity`, { headers: { authorization, ...headers } });
  const bearer = async (scope = "api1") => accessToken(await token(basic(), { scope }));
  const bound = async () => accessToken(await withProof(await proof()));
  const callProof = (access_token: string, claims = {}) => {
    const ath = new Bun.CryptoHasher("sha256").update(access_token).digest("base64url");
    return proof({ htm: "GET", htu: `${resource}/identity`, ath, ...claims });
  };

  const requests: [name: string, status: number, request: () => Promise<Response>][] = [
    ["Basic", 200, () => token(basic(), { scope: "api1" })],
    [
      "client_secret",
      200,
      () => token({}, { client_id: "client", client_secret: secret, scope: "api1" }),
    ],
    ["assertion", 200, async () => withAssertion(await assertion())],
    ["proof", 200, async () => withProof(await proof())],
    ["wrong secret", 401, () => token(basic(`client:${secret}2`))],
    ["secret of an unknown client", 401, () => token(basic(`nobody:${secret}`))],
    ["Basic with bad percent-encoding", 401, () => token(basic(`client:%zz${secret}`))],
    ["Basic with bad percent-encoding in the id", 401, () => token(basic(`%zz${secret}:a`))],
    ["Basic with NUL", 401, () => token(basic(`client:${secret}%00`))],
    ["Basic without a colon", 401, () => token(basic(secret))],
    ["Basic, not in base64", 401, () => token({ authorization: `Basic @${secret}` })],
    ["Basic, not in UTF-8", 401, () => token(basic(`client:\xFF${secret}`))],
    ["secret as Bearer", 401, () => token({ authorization: `Bearer ${secret}` })],
    ["secret as a scheme", 401, () => token({ authorization: secret })],
    ["secret twice", 400, () => token({}, `client_secret=${secret}&client_secret=${secret}`)],
    ["two methods", 400, () => token(basic(), { client_secret: secret })],
    ["client_secret with bad percent-encoding", 400, () => token({}, `client_secret=%zz${secret}`)],
    ["client_secret with NUL", 400, () => token({}, `client_secret=${secret}%00`)],
    [
      "client_secret in JSON",
      400,
      () => token({ "content-type": "application/json" }, `"${secret}"`),
    ],
    ["secret as grant_type", 400, () => token(basic(), `grant_type=${secret}`)],
    ["secret as scope", 400, () => token(basic(), { scope: secret })],
    ["secret as resource", 400, () => token(basic(), { resource: secret })],
    ["secret as assertion", 401, () => withAssertion(secret)],
    [
      "secret as the type of assertion",
      401,
      async () => token({}, { client_assertion_type: secret, client_assertion: await assertion() }),
    ],
    [
      "assertion with a header that is no JSON",
      401,
      async () => withAssertion(bent(await assertion(), 0, encoded(`{"alg":"ES256",${secret}`))),
    ],
    [
      "assertion with claims that are no JSON",
      401,
      async () => withAssertion(bent(await assertion(), 1, encoded(secret))),
    ],
    [
      "assertion with claims not in base64",
      401,
      async () => withAssertion(bent(await assertion(), 1, `@${secret}`)),
    ],
    [
      "assertion with another signature",
      401,
      async () => withAssertion(bent(await assertion(), 2, encoded(secret.padEnd(64)))),
    ],
    ["assertion, expired", 401, async () => withAssertion(await assertion({ exp: now() - 60 }))],
    ["assertion, other audience", 401, async () => withAssertion(await assertion({ aud: secret }))],
    [
      "assertion with claims of other types",
      401,
      async () => withAssertion(await assertion({ jti: [secret], iat: secret })),
    ],
    [
      "assertion with the private key in it",
      401,
      async () => withAssertion(await assertion({ exp: 0 }, { jwk: appJwk, kid: secret })),
    ],
    [
      "assertion with alg and crit unknown",
      401,
      async () => withAssertion(await assertion({}, { alg: secret, crit: ["exp"] })),
    ],
    [
      "assertion, used twice",
      401,
      async () => {
        const jwt = await assertion();
        expect((await withAssertion(jwt)).status).toBe(200);
        return await withAssertion(jwt);
      },
    ],
    ["secret as proof", 400, () => withProof(secret)],
    [
      "proof with a header that is no JSON",
      400,
      async () => withProof(bent(await proof(), 0, encoded(`{"typ":"dpop+jwt",${secret}`))),
    ],
    [
      "proof with claims that are no JSON",
      400,
      async () => withProof(bent(await proof(), 1, encoded(secret))),
    ],
    [
      "proof with another signature",
      400,
      async () => withProof(bent(await proof(), 2, encoded(secret.padEnd(64)))),
    ],
    [
      "proof with the private key in it",
      400,
      async () => withProof(await proof({}, { jwk: appJwk })),
    ],
    [
      "proof with a key that is none",
      400,
      async () =>
        withProof(await proof({}, { jwk: { kty: "EC", crv: secret, x: secret, y: secret } })),
    ],
    ["proof with an htu that is no URL", 400, async () => withProof(await proof({ htu: secret }))],
    [
      "proof for another URL",
      400,
      async () => withProof(await proof({ htu: `${origin}/${secret}` })),
    ],
    [
      "proof, used twice",
      400,
      async () => {
        const jwt = await proof();
        expect((await withProof(jwt)).status).toBe(200);
        return await withProof(jwt);
      },
    ],
    ["call as Bearer", 200, async () => call(`Bearer ${await bearer()}`)],
    [
      "call as DPoP",
      200,
      async () => {
        const access_token = await bound();
        return await call(`DPoP ${access_token}`, { dpop: await callProof(access_token) });
      },
    ],
    ["call without the scope", 403, async () => call(`Bearer ${await bearer("read")}`)],
    ["call with a bound token as Bearer", 401, async () => call(`Bearer ${await bound()}`)],
    ["call with a secret", 401, () => call(`Bearer ${secret}`)],
    ["call with a secret as Basic", 401, () => call(basic().authorization)],
    [
      "call with a token in two fields",
      400,
      async () => {
        const access_token = await bearer();
        return await call(`Bearer ${access_token}, Bearer ${access_token}`);
      },
    ],
    [
      "call, header that is no JSON",
      401,
      async () => call(`Bearer ${bent(await bearer(), 0, encoded(`{"alg":"ES256",${secret}`))}`),
    ],
    [
      "call, claims that are no JSON",
      401,
      async () => call(`Bearer ${bent(await bearer(), 1, encoded(secret))}`),
    ],
    [
      "call, another signature",
      401,
      async () => call(`Bearer ${bent(await bearer(), 2, encoded(secret.padEnd(64)))}`),
    ],
    [
      "call, unknown kid and claims of its own",
      401,
      async () =>
        call(`Bearer ${await assertion({ iss: secret }, { typ: "at+jwt", kid: secret })}`),
    ],
    ["call without a proof", 401, async () => call(`DPoP ${await bound()}`)],
    [
      "call, proof that is no JWT",
      401,
      async () => call(`DPoP ${await bound()}`, { dpop: secret }),
    ],
    [
      "call, proof with an htu that is no URL",
      401,
      async () => {
        const access_token = await bound();
        const dpop = await callProof(access_token, { htu: secret });
        return await call(`DPoP ${access_token}`, { dpop });
      },
    ],
    [
      "call, proof with claims that are no JSON",
      401,
      async () => {
        const access_token = await bound();
        const dpop = bent(await callProof(access_token), 1, encoded(secret));
        return await call(`DPoP ${access_token}`, { dpop });
      },
    ],
    [
      "token in the query",
      401,
      async () => fetch(`${resource}/identity?access_token=${await bearer()}`),
    ],
  ];

  test.each(requests)("%s → %d", async (_, status, request) => {
    const answer = await request();
    expect(answer.status).toBe(status);
    if (status !== 200) expect(await answer.text()).not.toContain(secret);
    else if (answer.url.startsWith(origin)) await accessToken(answer);
  });

  test("no secret, token, assertion, proof or private key member was printed", async () => {
    const database = new Database(join(cwd, "keys/keys.db"));
    const rows = database.query("SELECT jwk FROM signing_keys").all() as { jwk: string }[];
    database.close();
    expect(rows.length).toBe(2);
    for (const row of rows) {
      hidden.add(row.jwk);
      const key = Buffer.from(keyEncryptionSecret, "base64url");
      const { plaintext } = await jose.compactDecrypt(row.jwk, key);
      hidden.add(JSON.parse(new TextDecoder().decode(plaintext)).d);
    }
    expect([await idp.stop("SIGTERM"), await api.stop("SIGTERM")]).toEqual([0, 0]);
    expect(idp.log.length).toBe(expected);
    expect(api.log.length).toBeGreaterThan(10);
    const printed = [idp, api].flatMap(({ stdout, stderr }) => [stdout, stderr]);
    const lines = printed.flatMap(linesOf);
    const telling = lines.filter((line) => [...hidden].some((text) => line.includes(text)));
    expect(telling).toEqual([]);
    expect(hidden.size).toBeGreaterThan(100);
    expect([idp.stderr, api.stderr]).toEqual([
      `authorization server: ${origin}\n`,
      `API: ${resource}\n`,
    ]);
  });
});

// --- Unexpected failures -------------------------------------------------------------------------

describe("unexpected failures", () => {
  // No JSON can be made of a BigInt.
  const preload = join(temporaryDirectory(), "broken.ts");
  writeFileSync(
    preload,
    `import { authorizationServer, resourceServer } from "${root}/config.ts";
    authorizationServer.clients[0].claims = { tenant: 1n };
    authorizationServer.acceptedAlgorithms = [...authorizationServer.acceptedAlgorithms, 1n];
    resourceServer.acceptedAlgorithms = authorizationServer.acceptedAlgorithms;`,
  );

  async function startBroken(program: "idp" | "api", env: Record<string, string>) {
    const command = [process.execPath, "--preload", preload, join(root, `${program}.ts`)];
    const started = new Program(command, { cwd: temporaryDirectory(), env });
    await started.printed(/^(authorization server|API): /);
    return started;
  }

  test("POST /connect/token → 500 server_error, the cause in the log alone", async () => {
    const origin = freeOrigin();
    const idp = await startBroken("idp", { ISSUER: origin });
    const answer = await once(origin, post(form));
    expect([answer?.status, answer?.body]).toEqual([
      500,
      '{"error":"server_error","error_description":"Internal Server Error"}',
    ]);
    expect(answer?.headers.get("cache-control")).toBe("no-store");
    await eventually("a line", () => idp.log.length);
    expect(idp.log[0]).toMatchObject({ event: "token refused", error: "server_error" });
    expect(idp.log[0]!["reason"]).toContain("BigInt");
    expect(idp.stderr).toBe(`authorization server: ${origin}\n`);
  });

  const documents: ["idp" | "api", path: string][] = [
    ["idp", "/.well-known/openid-configuration"],
    ["api", "/.well-known/oauth-protected-resource"],
  ];
  test.each(documents)("%s.ts, GET %s → a bare 500, and the server goes on", async (...row) => {
    const [program, path] = row;
    const origin = freeOrigin();
    await startBroken(program, { ISSUER: origin, API_URL: origin });
    const answer = await once(origin, get(path));
    expect(answer?.status).toBe(500);
    expect(answer?.body).not.toMatch(/BigInt|JSON|\.ts|\//);
    expect(answer?.body.length).toBeLessThan(50);
    expect((await once(origin, get("/nothing")))?.status).toBe(404);
  });
});
