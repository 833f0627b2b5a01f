/**
 * Measures what a request costs: the CPU time that the server takes for it, as a ratio to what a
 * floor (floors.ts) takes in the same round. All servers run all the time and take turns of less
 * than a second, so what else the machine does falls on all alike.
 *
 *   bun run bench                                     some three minutes
 *   BENCH_ROUNDS=3 BENCH_SECONDS=0.3 bun run bench    a quick look
 *   BENCH_ROOT=../other bun run bench                 the servers of another checkout
 *   BENCH_LOAD=own bun run bench                      no wrk, although it is installed
 *
 * With TEST_DATABASE_URL the tokens are measured on PostgreSQL too, in a schema made for it. CPU
 * time and memory are read as Linux tells them. The log is on, and goes to /dev/null.
 * Exit code 1 if an answer was not what it should be; a goal that is missed is only shown.
 */

import { readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join, resolve } from "node:path";
import type { authorizationServer, resourceServer } from "../../config.ts";
import { basic, form, post, send } from "../support/http.ts";
import { assertion, assertionType, key, proof, secondsNow } from "../support/jwt.ts";
import { root as ownRoot, temporaryDirectory } from "../support/programs.ts";
import { reservePort } from "../support/servers.ts";
import { type Answers, hasWrk, run } from "./load.ts";

// --- Data ----------------------------------------------------------------------------------------

/** With a body it is a POST, else a GET. */
interface HttpRequest {
  path: string;
  headers: Record<string, string>;
  body?: string;
}

interface Server {
  url: string;
  process: Bun.Subprocess<"ignore", "ignore", "pipe">;
}

/** What is sent in the turns of a row. */
interface Load {
  /** Requests for one turn that sends at most so many. */
  requests: (count: number) => Promise<HttpRequest[]>;
  /** What the body of an answer of our servers is like. */
  answer: RegExp;
  /** A server accepts each of them once. */
  isOnce: boolean;
}

/** A line of the table. Each has a server of its own, so that its peak memory is its alone. */
interface Row extends Load {
  name: string;
  server: Server;
  floor?: Row;
  /** What the ratio should be at most. */
  goal?: number;
  turns: Turn[];
}

interface Turn extends Answers {
  cpuMicroseconds: number;
}

const { env } = process;
const root = env["BENCH_ROOT"] ? resolve(env["BENCH_ROOT"]) : ownRoot;
const rounds = Number(env["BENCH_ROUNDS"] ?? 9);
const seconds = Number(env["BENCH_SECONDS"] ?? 0.7);
const starts = Math.min(9, 2 * rounds);
const connections = 32;

const directory = temporaryDirectory();
const clientKey = await key();
const servers: Server[] = [];
let errors = 0;

// --- Servers -------------------------------------------------------------------------------------

const { PATH, HOME } = env;

/** Starts a server in a directory, and waits until it says where it is. */
async function start(command: string[], more: Record<string, string> = {}, cwd?: string) {
  const io = { stdin: "ignore", stdout: "ignore", stderr: "pipe" } as const;
  const child = Bun.spawn([process.execPath, "--no-orphans", ...command], {
    ...io,
    cwd: cwd ?? temporaryDirectory(),
    env: { PATH, HOME, ...more },
  });
  let printed = "";
  for await (const chunk of child.stderr) {
    printed += new TextDecoder().decode(chunk);
    const [, url] = /(https?:\/\/\S+)\n/.exec(printed) ?? [];
    if (!url) continue;
    const server: Server = { url, process: child };
    servers.push(server);
    return server;
  }
  throw new Error(`${command.join(" ").slice(0, 500)} ended: ${printed}`);
}

async function startFloor(floor: "a" | "b" | "c" | "d" | "e", jwk?: unknown): Promise<Server> {
  return await start([join(import.meta.dir, "floors.ts"), floor], {
    KEY: JSON.stringify(jwk) ?? "",
  });
}

/** Starts one of the servers with settings that no variable has. */
async function startWith(
  program: "idp" | "api",
  changes: Partial<typeof authorizationServer | typeof resourceServer>,
): Promise<Server> {
  const party = program === "idp" ? "authorizationServer" : "resourceServer";
  const script = `
    import { ${party} } from ${JSON.stringify(join(root, "config.ts"))};
    import { start } from ${JSON.stringify(join(root, `${program}.ts`))};
    const changes = ${JSON.stringify(changes)};
    const { url } = await start({ ...${party}, ...changes });
    console.error(\`started: \${changes.listen ? "http://" + changes.listen : url}\`);`;
  return await start(["--eval", script]);
}

async function startIdp(resource: string, databaseUrl?: string): Promise<Server> {
  const client = {
    client_id: "client",
    client_secrets: [{ sha256: Bun.SHA256.hash("secret", "base64") }],
    jwks: { keys: [clientKey.publicJwk] },
    grant_types: ["client_credentials"],
    scope: "api1",
    access_token_lifetime_seconds: 3600,
  };
  const scopes = [{ scope: "api1", description: "My API", resource }];
  const issuer = "http://127.0.0.1:0";
  const database = databaseUrl ? { databaseUrl } : {};
  return await startWith("idp", { issuer, scopes, clients: [client], ...database });
}

/** An API of its own at a port of its own, which goes by the name that all share. */
async function startApi(issuer: string, resource: string): Promise<Server> {
  const { port, release } = reservePort();
  const listen = `127.0.0.1:${port}`;
  const server = await startWith("api", { issuer, resource, listen, reusePort: true });
  release();
  return server;
}

// --- Loads ---------------------------------------------------------------------------------------

const withBasic = { authorization: basic("client", "secret") };

function tokenRequest(
  headers: Record<string, string>,
  parameters: Record<string, string>,
): HttpRequest {
  const all = { grant_type: "client_credentials", scope: "api1", ...parameters };
  const body = new URLSearchParams(all).toString();
  return { path: "/connect/token", headers: { "content-type": form, ...headers }, body };
}

const withSecret: Load = {
  requests: async () => [tokenRequest(withBasic, {})],
  answer: /"token_type":"Bearer"/,
  isOnce: false,
};

function withAssertion(issuer: string): Load {
  const requests = makeMany(async () => {
    const exp = secondsNow() + 300;
    const client_assertion = await assertion(clientKey, "client", issuer, { exp });
    return tokenRequest({}, { client_assertion_type: assertionType, client_assertion });
  });
  return { requests, answer: /"token_type":"Bearer"/, isOnce: true };
}

function withProof(issuer: string): Load {
  const requests = makeMany(async () => {
    const dpop = await proof(clientKey, "POST", `${issuer}/connect/token`);
    return tokenRequest({ ...withBasic, dpop }, {});
  });
  return { requests, answer: /"token_type":"DPoP"/, isOnce: true };
}

function callWith(authorization: string, more: Record<string, string> = {}): HttpRequest {
  return { path: "/identity", headers: { authorization, ...more } };
}

const isIdentity = /"type":"client_id"/;

function withToken(accessToken: string): Load {
  const requests = async () => [callWith(`Bearer ${accessToken}`)];
  return { requests, answer: isIdentity, isOnce: false };
}

/** Half of them in one turn, half in the next: each is forgotten by the API when it comes again. */
function withFreshTokens(tokens: string[]): Load {
  const all = tokens.map((accessToken) => callWith(`Bearer ${accessToken}`));
  const [half, otherHalf] = [all.slice(0, all.length / 2), all.slice(all.length / 2)];
  let turn = 0;
  const requests = async () => (turn++ % 2 ? half : otherHalf);
  return { requests, answer: isIdentity, isOnce: false };
}

function withBoundToken(accessToken: string, resource: string): Load {
  const requests = makeMany(async () => {
    const dpop = await proof(clientKey, "GET", `${resource}/identity`, accessToken);
    return callWith(`DPoP ${accessToken}`, { dpop });
  });
  return { requests, answer: isIdentity, isOnce: true };
}

/** Makes as many as asked for, some hundreds at a time. */
function makeMany<Value>(make: () => Promise<Value>) {
  return async (count: number): Promise<Value[]> => {
    const made: Value[] = [];
    while (made.length < count) {
      const batch = Array.from({ length: Math.min(500, count - made.length) }, make);
      made.push(...(await Promise.all(batch)));
    }
    return made;
  };
}

async function obtain(idp: Server, headers: Record<string, string> = {}): Promise<string> {
  const grant = { grant_type: "client_credentials", scope: "api1" };
  const answer = await post(`${idp.url}/connect/token`, grant, { ...withBasic, ...headers });
  return answer.json.access_token;
}

/** The public key that a token was signed with. */
async function keyOf(idp: Server, accessToken: string): Promise<unknown> {
  const { json } = await send(`${idp.url}/.well-known/openid-configuration/jwks`);
  const header = JSON.parse(Buffer.from(accessToken.split(".")[0]!, "base64url").toString());
  return json.keys.find(({ kid }: { kid: string }) => kid === header.kid);
}

// --- Rows ----------------------------------------------------------------------------------------

async function tokenRows(idp: Server, resource: string, postgres?: string): Promise<Row[]> {
  const rows: Row[] = [];
  const add = (name: string, server: Server, load: Load, more: Partial<Row> = {}) => {
    const row: Row = { name, server, ...load, turns: [], ...more };
    rows.push(row);
    return row;
  };
  const engines = postgres ? ["SQLite", "PostgreSQL"] : ["SQLite"];
  const floorB = add("floor (b)", await startFloor("b"), { ...withSecret, answer: /^ey/ });
  add("token, secret, SQLite", idp, withSecret, { floor: floorB, goal: 1.15 });
  if (postgres) {
    const server = await startIdp(resource, postgres);
    add("token, secret, PostgreSQL", server, withSecret, { floor: floorB, goal: 1.15 });
  }
  for (const [kind, floor, load] of [
    ["private_key_jwt", "d", withAssertion],
    ["DPoP", "e", withProof],
  ] as const) {
    const server = await startFloor(floor, clientKey.publicJwk);
    const row = add(`floor (${floor})`, server, { ...load(server.url), answer: /^ey/ });
    for (const engine of engines) {
      const idp = await startIdp(resource, engine === "PostgreSQL" ? postgres : undefined);
      add(`token, ${kind}, ${engine}`, idp, load(idp.url), { floor: row, goal: 1.25 });
    }
  }
  return rows;
}

async function apiRows(idp: Server, resource: string): Promise<Row[]> {
  const tokens = await makeMany(() => obtain(idp))(4_000);
  const [token = ""] = tokens;
  const dpop = await proof(clientKey, "POST", `${idp.url}/connect/token`);
  const boundToken = await obtain(idp, { dpop });
  const load = { one: withToken(token), bound: withBoundToken(boundToken, resource) };
  const a: Row = {
    ...{ name: "floor (a)", server: await startFloor("a"), turns: [] },
    ...{ ...load.one, answer: /^hi$/ },
  };
  const c: Row = {
    ...{ name: "floor (c)", server: await startFloor("c", await keyOf(idp, token)), turns: [] },
    ...{ ...withFreshTokens(tokens), answer: /^ok$/ },
  };
  const api = async (name: string, load: Load, floor: Row, goal?: number): Promise<Row> => {
    const server = await startApi(idp.url, resource);
    return { name: `API, ${name}`, server, ...load, floor, ...(goal ? { goal } : {}), turns: [] };
  };
  return [
    a,
    await api("one token", load.one, a, 1.25),
    c,
    await api("fresh token each", withFreshTokens(tokens), c, 1.15),
    await api("DPoP, one token", load.bound, c),
  ];
}

// --- Measuring -----------------------------------------------------------------------------------

/** In a round the rows take turns; a first round, of longer turns, warms them up. */
async function measure(rows: Row[]): Promise<void> {
  for (const row of rows) await checkAnswer(row);
  for (let round = 0; round <= rounds; round++) {
    for (const row of rows) {
      progress(`${round ? `round ${round} of ${rounds}` : "warming up"}: ${row.name}`);
      const turn = await takeTurn(row, round ? seconds : Math.max(1, seconds));
      if (turn.count === 0) throw new Error(`${row.name}: no answers`);
      errors += turn.errors;
      // The turn that warmed up is kept until another says how many requests the next one needs.
      if (round === 1) row.turns.pop();
      row.turns.push(turn);
    }
  }
}

/** All that is sent is made before the turn, so that making it takes no core from the server. */
async function takeTurn(row: Row, turnSeconds: number): Promise<Turn> {
  const last = row.turns.at(-1);
  const expected = last ? (1.4 * last.count * (turnSeconds + 0.1)) / last.seconds : 8_000;
  const requests = (await row.requests(Math.ceil(expected))).map(asText);
  const { url, process } = row.server;
  const before = cpuMicroseconds(process.pid);
  const { isOnce } = row;
  const load = { url, requests, isOnce, connections, seconds: turnSeconds };
  const answers = await run(load, directory);
  return { ...answers, cpuMicroseconds: cpuMicroseconds(process.pid) - before };
}

function asText({ path, headers, body }: HttpRequest): string {
  const length = body === undefined ? {} : { "content-length": `${body.length}` };
  const fields = Object.entries({ host: "127.0.0.1", ...headers, ...length });
  const lines = fields.map(([name, value]) => `${name}: ${value}\r\n`).join("");
  return `${body === undefined ? "GET" : "POST"} ${path} HTTP/1.1\r\n${lines}\r\n${body ?? ""}`;
}

/** The load generator looks at the status alone; this looks at what is answered. */
async function checkAnswer({ name, server, requests, answer }: Row): Promise<void> {
  const [request] = await requests(1);
  const { path, headers, body } = request!;
  const init = body === undefined ? { headers } : { method: "POST", headers, body };
  const { status, text } = await send(server.url + path, init);
  if (status !== 200 || !answer.test(text)) throw new Error(`${name}: answered ${status} ${text}`);
}

/** User and system time of all threads of a process; Linux counts both in hundredths (proc(5)). */
function cpuMicroseconds(pid: number): number {
  const [, fields = ""] = /\) (.*)/.exec(readFileSync(`/proc/${pid}/stat`, "utf8")) ?? [];
  const [utime, stime] = fields.split(" ").slice(11, 13).map(Number) as [number, number];
  return (utime + stime) * 10_000;
}

function peakMegabytes({ process: { pid } }: Server): number {
  const [, kilobytes] = /VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return Number(kilobytes) / 1024;
}

/** Milliseconds from the start of a process to its whole first answer, with existing keys. */
async function coldStarts(): Promise<void> {
  const { port, release } = reservePort();
  release();
  const issuer = `http://127.0.0.1:${port}`;
  const place = temporaryDirectory();
  const bare: number[] = [];
  const token: number[] = [];
  for (let round = 0; round <= starts; round++) {
    progress(`start ${round} of ${starts}`);
    const [startedBare, floor] = [performance.now(), await startFloor("a")];
    await send(floor.url);
    const bareMilliseconds = performance.now() - startedBare;
    const startedToken = performance.now();
    const idp = await start([join(root, "idp.ts")], { ISSUER: issuer }, place);
    if (!(await obtain(idp))) throw new Error("no token after a start");
    const milliseconds = performance.now() - startedToken;
    for (const server of [floor, idp]) server.process.kill("SIGKILL");
    await idp.process.exited;
    if (round === 0) continue; // it made the keys
    bare.push(bareMilliseconds);
    token.push(milliseconds);
  }
  progress("");
  const [first, floor] = [token, bare].map((all) => `${median(all).toFixed(0)} ms`);
  console.log(`Start to first token: ${first}, a bare Bun.serve to first answer: ${floor}.`);
}

// --- Tables --------------------------------------------------------------------------------------

const cpuOf = ({ cpuMicroseconds, count }: Turn) => cpuMicroseconds / count;
const rateOf = ({ count, seconds }: Turn) => count / seconds;

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return (sorted[sorted.length >> 1]! + sorted[(sorted.length - 1) >> 1]!) / 2;
}

/** Medians of the rounds; a ratio is the median of the ratios to the floor of each round. */
function printTable(rows: Row[]): void {
  const head = ["", "CPU µs", "of floor", "from", "to", "goal", "requests/s", "peak MB", "errors"];
  const lines = rows.map(({ name, server, turns, floor, goal }) => {
    const ratios = floor ? turns.map((turn, n) => cpuOf(turn) / cpuOf(floor.turns[n]!)) : [];
    const ratio = median(ratios);
    const spread = [ratio, Math.min(...ratios), Math.max(...ratios)];
    const shown = floor ? spread.map((value) => value.toFixed(2)) : ["", "", ""];
    const wanted = goal ? `${ratio <= goal ? "≤" : "missed"} ${goal}` : "";
    const failed = turns.reduce((sum, turn) => sum + turn.errors, 0);
    const cpu = median(turns.map(cpuOf)).toFixed(1);
    const rest = [median(turns.map(rateOf)), peakMegabytes(server), failed].map(whole);
    return [name, cpu, ...shown, wanted, ...rest];
  });
  const cells = [head, ...lines];
  const widths = head.map((_, column) => Math.max(...cells.map((line) => line[column]!.length)));
  const show = (line: string[]) =>
    line.map((cell, n) => (n ? cell.padStart(widths[n]!) : cell.padEnd(widths[n]!))).join("  ");
  console.log(`${cells.map(show).join("\n")}\n`);
}

const whole = (value: number) => Math.round(value).toLocaleString("en");

/** On a terminal, what is going on, in one line that the next one replaces. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
}

// --- Start ---------------------------------------------------------------------------------------

const sql = env["TEST_DATABASE_URL"]
  ? new Bun.SQL(env["TEST_DATABASE_URL"], { max: 1 })
  : undefined;
const schema = `bench_${crypto.randomUUID().replaceAll("-", "")}`;

/** Where the idp makes its tables. */
async function makeSchema(): Promise<string | undefined> {
  if (!sql) return undefined;
  await sql.unsafe(`CREATE SCHEMA ${schema}`);
  const url = new URL(env["TEST_DATABASE_URL"]!);
  url.searchParams.set("search_path", schema);
  return url.href;
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1));
process.on("exit", () => {
  for (const server of servers) server.process.kill("SIGKILL");
});

const load = hasWrk ? "wrk" : "a loop of its own";
const cores = `${availableParallelism()} cores for servers and load`;
console.log(`Bun ${Bun.version}, ${cores}, ${connections} connections of ${load}.`);
console.log(`Medians of ${rounds} rounds with turns of ${seconds} s.\n`);
try {
  const postgres = await makeSchema();
  const resource = "http://127.0.0.1:6001";
  const idp = await startIdp(resource);
  const rows = [...(await tokenRows(idp, resource, postgres)), ...(await apiRows(idp, resource))];
  await measure(rows);
  progress("");
  printTable(rows);
  await coldStarts();
} finally {
  for (const server of servers) server.process.kill("SIGKILL");
  await sql?.unsafe(`DROP SCHEMA ${schema} CASCADE`).finally(() => sql.close());
}
console.log(`${errors} errors, ${Math.round(performance.now() / 1000)} s.`);
process.exit(errors ? 1 : 0);
