/**
 * Databases: SQLite files, schemas on the PostgreSQL server of TEST_DATABASE_URL, servers and a
 * PgBouncer of our own, which end with the test runner even if it is killed.
 */

import { SQL } from "bun";
import { chownSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { temporaryDirectory } from "./programs.ts";

/** Waits for what must become true. Rejects after twenty seconds, and says what did not. */
export async function eventually(what: string, holds: () => unknown, seconds = 20): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  while (!(await holds())) {
    if (performance.now() > deadline) throw new Error(`waited in vain until ${what}`);
    await Bun.sleep(5);
  }
}

// --- Tables as an operator sees them -------------------------------------------------------------

export interface Row {
  alg: string;
  generation: number;
  kid: string;
  jwk: string;
  signs_from: number;
  signs_until: number;
  removed_at: number;
}

export class Table {
  readonly url: string;
  /** What uses the database, and is stopped before it is closed, the last one first. */
  readonly users: { stop: () => Promise<unknown> }[] = [];
  #sql: SQL | undefined;
  readonly #drop: (() => Promise<void>) | undefined;

  constructor(url: string, drop?: () => Promise<void>) {
    this.url = url;
    this.#drop = drop;
  }

  /** A connection of its own, made once the server has made the database. */
  get sql(): SQL {
    return (this.#sql ??= new SQL(this.url, { max: 1 }));
  }

  /** The file of a SQLite database. */
  get file(): string {
    return this.url.replace(/^sqlite:(\/\/)?/, "");
  }

  async rows(): Promise<Row[]> {
    const rows: Row[] = await this.sql`SELECT * FROM signing_keys ORDER BY alg, generation`;
    const numbers = ["generation", "signs_from", "signs_until", "removed_at"] as const;
    for (const row of rows) for (const column of numbers) row[column] = Number(row[column]);
    return [...rows];
  }

  async change(statement: string): Promise<void> {
    await this.sql.unsafe(statement);
  }

  /** The used identifiers whose names match, sorted. */
  async identifiers(pattern: string): Promise<string[]> {
    const rows = await this.sql`SELECT id FROM used_jtis WHERE id LIKE ${pattern} ORDER BY id`;
    return rows.map(({ id }: { id: string }) => id);
  }

  async close(): Promise<void> {
    for (const user of this.users.splice(0).toReversed()) await user.stop();
    await this.#sql?.close({ timeout: 0 }).catch(() => {}); // it may not even be open
    this.#sql = undefined;
    await this.#drop?.();
  }
}

/** A database in a new directory, which nobody has made yet. */
export async function sqlite(): Promise<Table> {
  return new Table(`sqlite://${join(temporaryDirectory(), "keys/keys.db")}`);
}

// --- PostgreSQL ----------------------------------------------------------------------------------

/** Where the tests may make what they need; without it what needs PostgreSQL is skipped. */
export const postgresUrl = process.env["TEST_DATABASE_URL"];

export async function execute(url: string, ...statements: string[]): Promise<void> {
  const sql = new SQL(url, { max: 1 });
  try {
    for (const statement of statements) await sql.unsafe(statement);
  } finally {
    await sql.close({ timeout: 0 });
  }
}

const newName = () => `test_${crypto.randomUUID().replaceAll("-", "")}`;

/** An empty schema of its own, whose connections bear its name. */
export async function postgres(): Promise<Table> {
  const schema = newName();
  await execute(postgresUrl!, `CREATE SCHEMA ${schema}`);
  const url = new URL(postgresUrl!);
  url.searchParams.set("search_path", schema);
  url.searchParams.set("application_name", schema);
  url.searchParams.set("max", "1"); // many instances share the server
  return new Table(url.href, async () => {
    const connections = `FROM pg_stat_activity WHERE application_name = '${schema}'`;
    const end = `SELECT pg_terminate_backend(pid) ${connections}`;
    await execute(postgresUrl!, end, `DROP SCHEMA ${schema} CASCADE`);
  });
}

/** The name of the schema of such a table. */
export const schemaOf = ({ url }: Table) => new URL(url).searchParams.get("search_path")!;

/** An empty database of its own: a pool hands on no search_path. */
export async function postgresDatabase(): Promise<Table> {
  const url = new URL(postgresUrl!);
  const name = newName();
  await execute(postgresUrl!, `CREATE DATABASE ${name}`);
  url.pathname = name;
  return new Table(url.href, () => execute(postgresUrl!, `DROP DATABASE ${name} WITH (FORCE)`));
}

/** The engines that a scenario runs on. */
export const engines = [
  { engine: "SQLite", make: sqlite, isMissing: false },
  postgresUrl
    ? { engine: "PostgreSQL", make: postgres, isMissing: false }
    : { engine: "PostgreSQL (needs TEST_DATABASE_URL)", make: sqlite, isMissing: true },
];

// --- Servers of our own --------------------------------------------------------------------------

const isRoot = process.getuid?.() === 0;
const installed = new Bun.Glob("postgresql/*/bin/initdb").scanSync("/usr/lib");
const programs = join("/usr/lib", dirname([...installed].toSorted().at(-1) ?? ""));
const postgresUser = /^postgres:[^:]*:(\d+):(\d+)/m.exec(readFileSync("/etc/passwd", "utf8"));

const canStart = Bun.which("setpriv") && (postgresUser || !isRoot);
const hasServer = canStart && existsSync(join(programs, "initdb"));
/** Why no server can be started here, for the name of a test that needs one. Empty if one can. */
export const noServer = hasServer ? "" : " (needs initdb and setpriv)";
const hasPgBouncer = canStart && postgresUrl && existsSync("/usr/sbin/pgbouncer");
export const noPgBouncer = hasPgBouncer ? "" : " (needs TEST_DATABASE_URL and pgbouncer)";

/**
 * Starts a program that ends with the tests, however they end. These servers refuse to run as root,
 * so they run as the user that the package of PostgreSQL made.
 */
function spawnServer(...command: string[]): Bun.Subprocess {
  const [, uid, gid] = postgresUser ?? [];
  const user = isRoot ? [`--reuid=${uid}`, `--regid=${gid}`, "--clear-groups"] : [];
  const wrapped = ["setpriv", ...user, "--pdeathsig=KILL", ...command];
  return Bun.spawn(wrapped, { stdout: "ignore", stderr: "ignore" });
}

/** A new directory that such a server may use. */
function serverDirectory(): string {
  const directory = temporaryDirectory();
  if (isRoot) chownSync(directory, Number(postgresUser![1]), Number(postgresUser![2]));
  return directory;
}

/** Whether a statement is executed. */
export const succeeds = (url: string, statement: string): Promise<boolean> =>
  execute(url, statement).then(
    () => true,
    () => false,
  );

let lastPort = 10_000 + ((process.pid * 997) % 20_000);

/** A port that nobody listens on, below those that the system gives to outgoing connections. */
export function freePort(): number {
  lastPort = lastPort < 29_999 ? lastPort + 1 : 10_000;
  try {
    Bun.listen({ hostname: "127.0.0.1", port: lastPort, socket: { data() {} } }).stop(true);
    return lastPort;
  } catch {
    return freePort();
  }
}

/** A PostgreSQL server that a test may start, stop and freeze. */
export class PostgresServer {
  readonly port = freePort();
  readonly url = `postgres://postgres:hidden@127.0.0.1:${this.port}/postgres`;
  readonly #directory = join(serverDirectory(), "server");
  #process: Bun.Subprocess | undefined;
  #frozen: Bun.Subprocess<"pipe"> | undefined;

  /** Makes an empty database, which nobody can reach yet. */
  async initialize(): Promise<this> {
    const options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"];
    const made = spawnServer(join(programs, "initdb"), ...options, "-D", this.#directory);
    if (await made.exited) throw new Error("initdb failed");
    return this;
  }

  /** Starts it, and waits until it takes connections. */
  async start(): Promise<void> {
    const own = ["-D", this.#directory, "-p", `${this.port}`, "-k", this.#directory];
    const flags = [...own, "-h", "127.0.0.1", "-F", "-B", "16MB"];
    this.#process = spawnServer(join(programs, "postgres"), ...flags);
    await eventually("PostgreSQL answers", () => succeeds(this.url, "SELECT 1"));
  }

  /** Ends it at once: every connection breaks, every transaction under way is rolled back. */
  async stop(): Promise<void> {
    this.#process?.kill("SIGINT");
    await this.#process?.exited;
  }

  /** Nobody gets an answer any more, and no connection breaks. */
  freeze(): void {
    const { pid } = this.#process!;
    process.kill(pid, "SIGSTOP");
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8").trim().split(" ");
    for (const child of children) process.kill(Number(child), "SIGSTOP");
    // What is frozen does not notice that the tests have ended. This goes on with it then.
    const command = ["sh", "-c", `read _; kill -CONT ${pid} ${children.join(" ")}`];
    this.#frozen = Bun.spawn(command, { stdin: "pipe", stderr: "ignore" });
  }

  async thaw(): Promise<void> {
    await this.#frozen?.stdin.end();
    await this.#frozen?.exited;
  }
}

/** The URL of a database behind a PgBouncer in transaction mode. */
export async function pgBouncer({ url, users }: Table): Promise<string> {
  const directory = serverDirectory();
  const port = freePort();
  const { hostname, port: serverPort, username, password, pathname } = new URL(url);
  const server = `host=${hostname} port=${serverPort || 5432} dbname=${pathname.slice(1)}`;
  const secret = password && ` password=${decodeURIComponent(password)}`;
  const { stdout } = Bun.spawnSync(["/usr/sbin/pgbouncer", "--version"]);
  // Before 1.21 it never knew named statements, nor this setting.
  const isOld = /PgBouncer 1\.(1?\d|20)\./.test(`${stdout}`);
  const settings = [
    ...["[databases]", `pooled = ${server} user=${username}${secret}`, "[pgbouncer]"],
    ...["listen_addr = 127.0.0.1", `listen_port = ${port}`, "unix_socket_dir =", "auth_type = any"],
    ...["pool_mode = transaction", "default_pool_size = 4"],
    ...(isOld ? [] : ["max_prepared_statements = 0"]),
  ];
  const file = join(directory, "pgbouncer.ini");
  writeFileSync(file, settings.join("\n"));
  const program = spawnServer("/usr/sbin/pgbouncer", file);
  users.push({ stop: async () => program.kill("SIGKILL") });
  const pooled = `postgres://${username}@127.0.0.1:${port}/pooled`;
  await eventually("PgBouncer answers", () => succeeds(pooled, "SELECT 1"));
  return pooled;
}

/** A TCP port that says `error` to every PostgreSQL client, as a server does that starts itself. */
export function sayingPostgres(code: string, message: string) {
  const fields = Buffer.from(`SFATAL\0C${code}\0M${message}\0\0`);
  const length = Buffer.alloc(4);
  length.writeInt32BE(fields.length + 4);
  const error = Buffer.concat([Buffer.from("E"), length, fields]);
  const data = (socket: Bun.Socket<undefined>) => void socket.end(error);
  return Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data } });
}
