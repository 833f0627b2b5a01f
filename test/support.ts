/** What the tests share: free ports, programs as processes, modules with a configuration of their own. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as configuration from "../config.ts";

export type Changes = {
  [party in "authorizationServer" | "resourceServer" | "client"]?: Partial<
    (typeof configuration)[party]
  >;
};

export const root = join(import.meta.dir, "..");
const temporary: string[] = [];
const running = new Set<Program>();

/** A new directory, removed when the tests end. */
export function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), "oauth-test-"));
  temporary.push(directory);
  return directory;
}

let lastPort = 10_000 + ((process.pid * 997) % 20_000); // test files may run side by side

/** A port that nobody listens on, below those that the system gives to outgoing connections. */
export function freePort(): number {
  for (;;) {
    lastPort = lastPort < 29_999 ? lastPort + 1 : 10_000;
    try {
      const socket = { data() {} };
      Bun.listen({ hostname: "127.0.0.1", port: lastPort, socket }).stop(true);
      return lastPort;
    } catch {} // in use
  }
}

export const freeOrigin = () => `http://127.0.0.1:${freePort()}`;

/** A started program, with all that it printed so far. */
export class Program {
  stdout = "";
  stderr = "";
  readonly process: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly #read: Promise<unknown>;

  constructor(
    command: string[],
    options: { cwd: string; env: Record<string, string | undefined>; detached?: boolean },
  ) {
    this.process = Bun.spawn(command, {
      ...options,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    this.#read = Promise.all([this.#collect("stdout"), this.#collect("stderr")]);
    running.add(this);
  }

  async #collect(stream: "stdout" | "stderr"): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of this.process[stream]) {
      this[stream] += decoder.decode(chunk, { stream: true });
    }
  }

  /** Waits until the program printed what `pattern` matches. Rejects when it ended before. */
  async printed(pattern: RegExp, stream: "stdout" | "stderr" = "stderr"): Promise<void> {
    while (!pattern.test(this[stream])) {
      if (this.process.exitCode !== null || this.process.signalCode !== null) {
        await this.#read;
        if (pattern.test(this[stream])) return;
        throw new Error(`the program ended without ${pattern}: ${this.stderr}${this.stdout}`);
      }
      await Bun.sleep(5);
    }
  }

  /** The exit code, once the program ended and everything it printed was read. */
  async ended(): Promise<number> {
    const code = await this.process.exited;
    await this.#read;
    running.delete(this);
    return code;
  }

  async stop(signal: NodeJS.Signals = "SIGKILL"): Promise<number> {
    this.process.kill(signal);
    return await this.ended();
  }

  /** The lines of the log, parsed. */
  get log(): Record<string, unknown>[] {
    const lines = this.stdout.split("\n").filter((line) => line.startsWith("{"));
    return lines.map((line) => JSON.parse(line));
  }
}

interface LaunchOptions {
  cwd?: string;
  env?: Record<string, string | undefined>;
  changes?: Changes;
  arguments?: string[];
}

/** Starts one of the programs in a directory of its own, with a changed configuration. */
export function launch(program: "idp" | "api" | "client", options: LaunchOptions = {}): Program {
  const { cwd = temporaryDirectory(), env = {}, changes, arguments: rest = [] } = options;
  const preload = changes ? ["--preload", join(root, "test/configure.ts")] : [];
  const configured = changes ? { CONFIGURATION: JSON.stringify(changes) } : {};
  return new Program([process.execPath, ...preload, join(root, `${program}.ts`), ...rest], {
    cwd,
    env: { PATH: process.env["PATH"], HOME: process.env["HOME"], ...configured, ...env },
  });
}

let instances = 0;

/**
 * A program's module, loaded anew in this process with a changed configuration. `use` gets the
 * module, and the changes hold until it is done (start the server there).
 */
export async function withModule<Module, Result>(
  program: "idp" | "api" | "client",
  changes: Changes,
  use: (module: Module) => Promise<Result>,
): Promise<Result> {
  const before = structuredClone({
    authorizationServer: configuration.authorizationServer,
    resourceServer: configuration.resourceServer,
    client: configuration.client,
  });
  for (const party of ["authorizationServer", "resourceServer", "client"] as const) {
    Object.assign(configuration[party], changes[party]);
  }
  try {
    instances += 1;
    return await use((await import(`../${program}.ts?${instances}`)) as Module);
  } finally {
    for (const party of ["authorizationServer", "resourceServer", "client"] as const) {
      Object.assign(configuration[party], before[party]);
    }
  }
}

/** Ends every program that is still running and removes the directories. For `afterAll`. */
export async function cleanUp(): Promise<void> {
  await Promise.all([...running].map((program) => program.stop()));
  for (const directory of temporary.splice(0)) rmSync(directory, { recursive: true, force: true });
}

/**
 * Collects what the servers in this process log from now on, until `stop` is called. `requests` are
 * the lines about requests, in the order of their answers; `until` waits for so many of them.
 */
export function captureLog() {
  const requests: Record<string, unknown>[] = [];
  const started = new Date().toISOString();
  const { write } = process.stdout;
  let text = "";
  process.stdout.write = ((chunk: string, done?: () => void) => {
    text += chunk;
    for (const line of chunk.split("\n").filter(Boolean)) {
      const entry = line.startsWith("{") ? JSON.parse(line) : {};
      if ("address" in entry && entry.time >= started) requests.push(entry);
    }
    done?.();
    return true;
  }) as typeof process.stdout.write;
  return {
    requests,
    text: () => text,
    stop: () => void (process.stdout.write = write),
    async until(count: number): Promise<void> {
      for (const deadline = Date.now() + 3_000; requests.length < count; await Bun.sleep(5)) {
        if (Date.now() > deadline) throw new Error(`${requests.length} of ${count} lines logged`);
      }
    },
  };
}

/** A JWT with any header and claims, valid or not; without a key its signature is empty. */
export async function signedJwt(
  header: Record<string, unknown>,
  claims: unknown,
  key?: CryptoKey,
): Promise<string> {
  const parts = [header, claims].map((part) => Buffer.from(JSON.stringify(part)));
  const input = parts.map((part) => part.toString("base64url")).join(".");
  if (!key) return `${input}.`;
  const bits = Number(/[RPEH]S(\d+)/.exec(`${header["alg"]}`)?.[1] ?? 256);
  const parameters = { ...key.algorithm, hash: `SHA-${bits}`, saltLength: bits / 8 };
  const signature = await crypto.subtle.sign(parameters, key, Buffer.from(input));
  return `${input}.${Buffer.from(signature).toString("base64url")}`;
}

/**
 * Runs what depends on the exact second, which it gets in seconds since 1970, again if the clock
 * ticked meanwhile: whoever looked at the clock in a run that counts saw that second.
 */
export async function withinOneSecond<Result>(
  run: (now: number) => Promise<Result>,
): Promise<Result> {
  for (let tries = 0; tries < 5; tries++) {
    const now = Math.floor(Date.now() / 1000);
    const result = await run(now);
    if (Math.floor(Date.now() / 1000) === now) return result;
  }
  throw new Error("five runs in a row took longer than the rest of a second");
}

/** Sends bytes that `fetch` would not, and returns all that comes back until the server hangs up. */
export async function exchange(origin: string, text: string): Promise<string> {
  const { hostname, port } = new URL(origin);
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  let answer = "";
  const socket = await Bun.connect({
    hostname,
    port: Number(port),
    socket: {
      data: (_, chunk) => void (answer += chunk.toString("latin1")),
      close: () => resolve(answer),
      error: (_, error) => reject(error),
    },
  });
  socket.write(text);
  const timer = setTimeout(() => reject(new Error(`no end of the answer: ${answer}`)), 3_000);
  return await promise.finally(() => {
    clearTimeout(timer);
    socket.end();
  });
}

/** The thumbprint of a public key, worked out by hand: RFC 7638 §3, RFC 8037 §2, and AKP keys. */
export function thumbprint(jwk: Record<string, unknown>): string {
  const required: Record<string, string[]> = {
    AKP: ["alg", "kty", "pub"],
    EC: ["crv", "kty", "x", "y"],
    OKP: ["crv", "kty", "x"],
    RSA: ["e", "kty", "n"],
  };
  const members = required[`${jwk["kty"]}`]!.map((name) => [name, jwk[name]]);
  const text = JSON.stringify(Object.fromEntries(members));
  return new Bun.CryptoHasher("sha256").update(text).digest("base64url");
}

/** Waits until `condition` gives something, and returns that. Throws when it takes too long. */
export async function eventually<Value>(
  what: string,
  condition: () => Value | Promise<Value>,
  seconds = 5,
): Promise<NonNullable<Value>> {
  for (const deadline = Date.now() + seconds * 1000; ; await Bun.sleep(5)) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`not within ${seconds} s: ${what}`);
  }
}
