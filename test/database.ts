/**
 * Databases for the tests: SQLite files, schemas on the server of TEST_DATABASE_URL, servers of our
 * own, the tables as an operator sees them, and instances that use them in this process.
 */

import { SQL } from "bun";
import { spyOn } from "bun:test";
import { chownSync, existsSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { authorizationServer } from "../config.ts";
import { freeOrigin, freePort, temporaryDirectory, withModule } from "./support.ts";

export type Idp = typeof import("../idp.ts");
export type Settings = Partial<typeof authorizationServer.signingKeys>;

export interface Row {
  alg: string;
  generation: number;
  kid: string;
  jwk: string;
  signs_from: number;
  signs_until: number;
  removed_at: number;
}

// --- PostgreSQL ----------------------------------------------------------------------------------

/** Where the tests may make what they need; without it what needs PostgreSQL is skipped. */
export const postgresUrl = process.env["TEST_DATABASE_URL"];

const schemas = new Set<string>();

/** The URL of an empty schema of its own. Its connections bear its name. */
export async function freshSchema(server = postgresUrl!): Promise<string> {
  const schema = `test_${crypto.randomUUID().replaceAll("-", "")}`;
  await execute(server, `CREATE SCHEMA ${schema}`);
  if (server === postgresUrl) schemas.add(schema);
  const url = new URL(server);
  url.searchParams.set("search_path", schema);
  url.searchParams.set("application_name", schema);
  url.searchParams.set("max", "2"); // many instances share the server
  return url.href;
}

/** Ends the connections to a schema, and drops it. */
export async function dropSchema(schema: string): Promise<void> {
  schemas.delete(schema);
  const connections = `FROM pg_stat_activity WHERE application_name = '${schema}'`;
  const ended = `SELECT pg_terminate_backend(pid) ${connections}`;
  await execute(postgresUrl!, `${ended}; DROP SCHEMA ${schema} CASCADE`);
}

export async function execute(url: string, statements: string): Promise<void> {
  const sql = new SQL(url, { max: 1 });
  await sql.unsafe(statements).finally(() => sql.close());
}

const versions = "/usr/lib/postgresql";
const [binaries] = postgresUrl ? Array.from(new Bun.Glob("*/bin/initdb").scanSync(versions)) : [];

/** Whether a test can start a server of its own. */
export const canServe = binaries !== undefined;

/** A PostgreSQL server of its own in a temporary directory, which the tests may stop and freeze. */
export class PostgresServer {
  readonly port = freePort();
  readonly url = `postgres://postgres@127.0.0.1:${this.port}/postgres`;
  readonly #directory = join(temporaryDirectory(), "server");
  readonly #as: string[];
  #process: Bun.Subprocess | undefined;

  constructor() {
    mkdirSync(this.#directory, { mode: 0o700 });
    // It refuses to run as root, so it runs as the user that its package made.
    const isRoot = process.getuid?.() === 0;
    const [, uid, gid] = /^postgres:[^:]*:(\d+):(\d+)/m.exec(readFileSync("/etc/passwd", "utf8"))!;
    for (const path of isRoot ? [join(this.#directory, ".."), this.#directory] : []) {
      chownSync(path, Number(uid), Number(gid));
    }
    const user = isRoot ? [`--reuid=${uid}`, `--regid=${gid}`, "--clear-groups"] : [];
    this.#as = ["setpriv", ...user, "--pdeathsig=KILL"]; // it ends with the tests, however they end
  }

  #program(name: string): string[] {
    return [...this.#as, join(versions, binaries!, "..", name)];
  }

  /** Starts it, the first time with an empty database, and waits until it takes connections. */
  async start(): Promise<void> {
    if (!existsSync(join(this.#directory, "PG_VERSION"))) await this.#initialize();
    const settings = ["listen_addresses=127.0.0.1", `unix_socket_directories=${this.#directory}`];
    const flags = [...settings, "fsync=off", "shared_buffers=16MB"].flatMap((s) => ["-c", s]);
    const command = ["-D", this.#directory, "-p", `${this.port}`, ...flags];
    this.#process = Bun.spawn([...this.#program("postgres"), ...command], { stderr: "ignore" });
    for (const deadline = Date.now() + 10_000; ; await Bun.sleep(20)) {
      const up = await execute(this.url, "SELECT 1").then(
        () => true,
        () => false,
      );
      if (up) return;
      if (Date.now() > deadline) throw new Error("the PostgreSQL server did not start");
    }
  }

  async #initialize(): Promise<void> {
    const options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"];
    const command = [...this.#program("initdb"), ...options, "-D", this.#directory];
    const made = Bun.spawn(command, { stdout: "ignore", stderr: "pipe" });
    if (await made.exited) throw new Error(`initdb failed: ${await made.stderr.text()}`);
    process.on("exit", () => this.#signal("SIGKILL"));
  }

  /** Ends it at once: every connection breaks, every transaction under way is rolled back. */
  async stop(): Promise<void> {
    this.#signal("SIGCONT");
    this.#process?.kill("SIGINT");
    await this.#process?.exited;
  }

  /** Nobody gets an answer any more, and no connection breaks. */
  freeze(): void {
    this.#signal("SIGSTOP");
  }

  thaw(): void {
    this.#signal("SIGCONT");
  }

  /** To the server and all its children, each of which has a session of its own. */
  #signal(signal: NodeJS.Signals): void {
    const { pid, exitCode = 0 } = this.#process ?? {};
    if (pid === undefined || exitCode !== null) return;
    const parents = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
    const children = parents.filter((name) => parentOf(name) === pid).map(Number);
    for (const one of [pid, ...children]) {
      try {
        process.kill(one, signal);
      } catch {} // ended meanwhile
    }
  }
}

function parentOf(pid: string): number {
  try {
    return Number(/\) \S (\d+)/.exec(readFileSync(`/proc/${pid}/stat`, "utf8"))?.[1]);
  } catch {
    return 0; // ended meanwhile
  }
}

// --- Tables --------------------------------------------------------------------------------------

/** A database as an operator sees it. */
export class Table {
  readonly url: string;
  #sql: SQL | undefined;

  constructor(url: string) {
    this.url = url;
  }

  /** A connection; the first one is made once the server made the database. */
  get sql(): SQL {
    return (this.#sql ??= new SQL(this.url, { max: 1 }));
  }

  async rows(): Promise<Row[]> {
    const rows: Row[] = await this.sql`SELECT * FROM signing_keys ORDER BY alg, generation`;
    const numbers = ["generation", "signs_from", "signs_until", "removed_at"] as const;
    for (const row of rows) for (const column of numbers) row[column] = Number(row[column]);
    return [...rows];
  }

  /** The rows of one algorithm, without what is random in them. */
  async dates(alg = "ES256"): Promise<number[][]> {
    const rows = (await this.rows()).filter((row) => row.alg === alg);
    return rows.map((row) => [row.generation, row.signs_from, row.signs_until, row.removed_at]);
  }

  async change(statement: string): Promise<void> {
    await this.sql.unsafe(statement);
  }

  /** As if the server had been off for so long. */
  async age(seconds: number): Promise<void> {
    const columns = ["signs_from", "signs_until", "removed_at"];
    await this.change(
      `UPDATE signing_keys SET ${columns.map((name) => `${name} = ${name} - ${seconds}`)}`,
    );
  }

  async disconnect(): Promise<void> {
    await this.#sql?.close().catch(() => {}); // it may not even be open
    this.#sql = undefined;
  }

  async close(): Promise<void> {
    await this.disconnect();
    if (this.url.startsWith("postgres"))
      await dropSchema(new URL(this.url).searchParams.get("search_path")!);
  }
}

/** A database in a new directory, which nobody made yet. */
export const sqlite = () => new Table(`sqlite://${join(temporaryDirectory(), "keys/keys.db")}`);

// --- Instances in this process -------------------------------------------------------------------

const servers: Bun.Server<undefined>[] = [];
const polls: Timer[] = [];
const still = { pollSeconds: 20 * 86_400 }; // what a test does to a table is seen by `refresh` alone
let loaded: Promise<unknown> = Promise.resolve();

/** Starts an instance. It answers requests only if `origin` is given, and polls only if told to. */
export async function boot(
  { url: databaseUrl }: Table,
  settings: Settings = {},
  { secret: keyEncryptionSecret = "", origin = "" } = {},
): Promise<Idp> {
  const signingKeys = { ...authorizationServer.signingKeys, ...still, ...settings };
  const changes = { issuer: origin || freeOrigin(), databaseUrl, keyEncryptionSecret, signingKeys };
  const load = () =>
    withModule<Idp, Idp>("idp", { authorizationServer: changes }, async (idp) => idp);
  const loading = loaded.then(load); // one after the other: each changes the configuration
  loaded = loading;
  const idp = await loading;
  const timers = settings.pollSeconds ? spyOn(globalThis, "setInterval") : undefined;
  const server = await idp.start();
  for (const { value } of timers?.mock.results ?? []) polls.push(value as Timer);
  timers?.mockRestore();
  if (origin) servers.push(server);
  else await server.stop(true);
  return idp;
}

/** No instance reads its table by itself any more. */
export function stopPolls(): void {
  for (const timer of polls.splice(0)) clearInterval(timer);
}

/** For `afterAll`. */
export async function stopInstances(): Promise<void> {
  stopPolls();
  for (const server of servers.splice(0)) await server.stop(true);
  for (const schema of schemas) await dropSchema(schema);
}
