/**
 * Measures what a request costs: the CPU time that the server takes for it, as a ratio to what a
 * floor (floors.ts) takes in the same round. All servers run all the time and take turns of less
 * than a second, so what else the machine does falls on all alike.
 *
 *   bun run bench                                     some three minutes
 *   BENCH_ROUNDS=3 BENCH_SECONDS=0.3 bun run bench    a quick look
 *
 * With TEST_DATABASE_URL the tokens are measured on PostgreSQL too, in a schema made for it. CPU
 * time and memory are read as Linux tells them. The log is on, and goes to /dev/null.
 * Exit code 1 if an answer was not what it should be; a goal that is missed is only shown.
 */

import { readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import * as jose from "jose";
import { authorizationServer, type resourceServer } from "../../config.ts";
import { once } from "../attack/hostile.ts";
import { postgres, postgresUrl } from "../support/databases.ts";
import { basic, form, post, send } from "../support/http.ts";
import { assertion, assertionType, key, proof, secondsNow } from "../support/jwt.ts";
import { root, temporaryDirectory } from "../support/programs.ts";
import { reservePort } from "../support/servers.ts";
import { type Answers, run } from "./load.ts";

const { env } = process;
const rounds = Number(env["BENCH_ROUNDS"] ?? 9);
const seconds = Number(env["BENCH_SECONDS"] ?? 0.7);
const connections = 32;

// --- Servers -------------------------------------------------------------------------------------

interface Server {
  url: string;
  process: Bun.Subprocess<"ignore", "ignore", "pipe">;
}

const servers: Server[] = [];
process.on("exit", () => servers.forEach((server) => server.process.kill("SIGKILL")));
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1));

/** Starts a server in a directory, and waits until it says where it is. */
async function start(command: string[], more = {}, cwd = temporaryDirectory()): Promise<Server> {
  const child = Bun.spawn([process.execPath, "--no-orphans", ...command], {
    ...({ stdin: "ignore", stdout: "ignore", stderr: "pipe", cwd } as const),
    env: { PATH: env["PATH"], HOME: env["HOME"], ...more },
  });
  let printed = "";
  for await (const chunk of child.stderr) {
    printed += new TextDecoder().decode(chunk);
    const [, url] = /(https?:\/\/\S+)\n/.exec(printed) ?? [];
    if (!url) continue;
    const server = { url, process: child };
    servers.push(server);
    return server;
  }
  throw new Error(`${command.join(" ").slice(0, 500)} ended: ${printed}`);
}

const startFloor = (floor: "a" | "b" | "c" | "d" | "e", jwk: unknown = null) =>
  start([join(import.meta.dir, "floors.ts"), floor], { KEY: JSON.stringify(jwk) });

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

const resource = "http://127.0.0.1:6001";
const clientKey = await key();

async function startIdp(databaseUrl?: string): Promise<Server> {
  const [registration] = authorizationServer.clients;
  const clients = [{ ...registration!, jwks: { keys: [clientKey.publicJwk] } }];
  const scopes = [{ scope: "api1", description: "My API", resource }];
  const database = databaseUrl ? { databaseUrl } : {};
  return await startWith("idp", { issuer: "http://127.0.0.1:0", scopes, clients, ...database });
}

/** An API at a port of its own, which goes by the name that all share. */
async function startApi(issuer: string): Promise<Server> {
  const { port, release } = reservePort();
  const listen = `127.0.0.1:${port}`;
  const server = await startWith("api", { issuer, resource, listen, reusePort: true });
  release();
  return server;
}

// --- Loads ---------------------------------------------------------------------------------------

interface Load {
  /** Requests for one turn that sends at most so many, as text. */
  requests: (count: number) => Promise<string[]>;
  /** A server accepts each of them once. */
  isOnce: boolean;
}

const request = (line: string, headers: Record<string, string>, body = "") =>
  [
    ...[`${line} HTTP/1.1`, "host: 127.0.0.1", `content-length: ${body.length}`],
    ...[...Object.entries(headers).map((pair) => pair.join(": ")), "", body],
  ].join("\r\n");

/** A load of requests that are each made anew, some hundreds at a time. */
function each(make: () => Promise<string>): Load {
  const requests = async (count: number) => {
    const made: string[] = [];
    while (made.length < count)
      made.push(...(await Promise.all(Array.from({ length: 500 }, () => make()))));
    return made;
  };
  return { requests, isOnce: true };
}

const withBasic = { authorization: basic("client", "secret") };
const grant = { grant_type: "client_credentials", scope: "api1" };

function tokenRequest(headers: Record<string, string>, parameters: object): string {
  const body = new URLSearchParams({ ...grant, ...parameters }).toString();
  return request("POST /connect/token", { "content-type": form, ...headers }, body);
}

/** What is sent to the token endpoint of a server, by how the client shows who it is. */
const tokenLoads = {
  secret: (): Load => ({ requests: async () => [tokenRequest(withBasic, {})], isOnce: false }),
  private_key_jwt: (issuer: string) =>
    each(async () => {
      const exp = secondsNow() + 300;
      const client_assertion = await assertion(clientKey, "client", issuer, { exp });
      return tokenRequest({}, { client_assertion_type: assertionType, client_assertion });
    }),
  DPoP: (issuer: string) =>
    each(async () => {
      const dpop = await proof(clientKey, "POST", `${issuer}/connect/token`);
      return tokenRequest({ ...withBasic, dpop }, {});
    }),
};

/** Half of them in one turn, half in the next: each is forgotten by the API when it comes again. */
function withTokens(tokens: string[]): Load {
  const all = tokens.map((token) => request("GET /identity", { authorization: `Bearer ${token}` }));
  const half = Math.ceil(all.length / 2);
  let turn = 0;
  const requests = async () => (++turn % 2 ? all.slice(0, half) : all.slice(-half));
  return { requests, isOnce: false };
}

const withBoundToken = (token: string) =>
  each(async () => {
    const dpop = await proof(clientKey, "GET", `${resource}/identity`, token);
    return request("GET /identity", { authorization: `DPoP ${token}`, dpop });
  });

async function obtain(idp: Server, headers = {}): Promise<string> {
  const answer = await post(`${idp.url}/connect/token`, grant, { ...withBasic, ...headers });
  return answer.json.access_token;
}

// --- Rows ----------------------------------------------------------------------------------------

/** A line of the table. Each has a server of its own, so that its peak memory is its alone. */
interface Row extends Load {
  name: string;
  server: Server;
  /** What the body of an answer is like. */
  answer: RegExp;
  floor?: Row;
  /** What the ratio should be at most. */
  goal?: number;
  turns: (Answers & { cpuMicroseconds: number })[];
}

const row = (name: string, server: Server, load: Load, answer: RegExp): Row => ({
  ...{ name, server, ...load, answer, turns: [] },
});

async function tokenRows(databases: Record<string, string | undefined>): Promise<Row[]> {
  const rows: Row[] = [];
  const kinds = [
    ["secret", "b", 1.15],
    ["private_key_jwt", "d", 1.25],
    ["DPoP", "e", 1.25],
  ] as const;
  for (const [kind, letter, goal] of kinds) {
    const server = await startFloor(letter, clientKey.publicJwk);
    const floor = row(`floor (${letter})`, server, tokenLoads[kind](server.url), /^ey/);
    rows.push(floor);
    for (const [engine, databaseUrl] of Object.entries(databases)) {
      const idp = await startIdp(databaseUrl);
      const answer = kind === "DPoP" ? /"token_type":"DPoP"/ : /"token_type":"Bearer"/;
      const ours = row(`token, ${kind}, ${engine}`, idp, tokenLoads[kind](idp.url), answer);
      rows.push({ ...ours, floor, goal });
    }
  }
  return rows;
}

async function apiRows(): Promise<Row[]> {
  const idp = await startIdp();
  const tokens: string[] = [];
  while (tokens.length < 4_000)
    tokens.push(...(await Promise.all(Array.from({ length: 100 }, () => obtain(idp)))));
  const [token = ""] = tokens;
  const dpop = await proof(clientKey, "POST", `${idp.url}/connect/token`);
  const bound = await obtain(idp, { dpop });
  const { json } = await send(`${idp.url}/.well-known/openid-configuration/jwks`);
  const { kid } = jose.decodeProtectedHeader(token);
  const publicKey = json.keys.find((jwk: jose.JWK) => jwk.kid === kid);
  const a = row("floor (a)", await startFloor("a"), withTokens([token]), /^hi$/);
  const c = row("floor (c)", await startFloor("c", publicKey), withTokens(tokens), /^ok$/);
  const ours = async (name: string, load: Load, floor: Row, goal?: number): Promise<Row> => ({
    ...row(`API, ${name}`, await startApi(idp.url), load, /"type":"client_id"/),
    ...{ floor, ...(goal ? { goal } : {}) },
  });
  return [
    ...[a, await ours("one token", withTokens([token]), a, 1.25)],
    ...[c, await ours("fresh token each", withTokens(tokens), c, 1.15)],
    await ours("DPoP, one token", withBoundToken(bound), c),
  ];
}

// --- Measuring -----------------------------------------------------------------------------------

/** In a round the rows take turns; a first round, of longer turns, warms them up. */
async function measure(rows: Row[]): Promise<void> {
  for (const one of rows) await checkAnswer(one);
  for (let round = 0; round <= rounds; round++) {
    for (const one of rows) {
      const turn = await takeTurn(one, round ? seconds : Math.max(1, seconds));
      if (turn.count === 0) throw new Error(`${one.name}: no answers`);
      // The turn that warmed up is kept until another says how many requests the next one needs.
      if (round === 1) one.turns.pop();
      one.turns.push(turn);
    }
  }
}

/** All that is sent is made before the turn, so that making it takes no core from the server. */
async function takeTurn({ turns, requests, isOnce, server }: Row, turnSeconds: number) {
  const last = turns.at(-1);
  const expected = last ? (1.4 * last.count * (turnSeconds + 0.1)) / last.seconds : 8_000;
  const texts = await requests(Math.ceil(expected));
  const before = cpuMicroseconds(server);
  const load = { url: server.url, requests: texts, isOnce, connections, seconds: turnSeconds };
  const answers = await run(load);
  return { ...answers, cpuMicroseconds: cpuMicroseconds(server) - before };
}

/** The load looks at the status alone; this looks at what is answered. */
async function checkAnswer({ name, server, requests, answer }: Row): Promise<void> {
  const [text = ""] = await requests(1);
  const { status, body } = await once(server.url, text);
  if (status !== 200 || !answer.test(body)) throw new Error(`${name}: answered ${status} ${body}`);
}

const procFile = ({ process: { pid } }: Server, name: string) =>
  readFileSync(`/proc/${pid}/${name}`, "utf8");

/** User and system time of all threads of a process; Linux counts both in hundredths (proc(5)). */
function cpuMicroseconds(server: Server): number {
  const [, fields = ""] = /\) (.*)/.exec(procFile(server, "stat")) ?? [];
  const [utime = 0, stime = 0] = fields.split(" ").slice(11, 13).map(Number);
  return (utime + stime) * 10_000;
}

const peakMegabytes = (server: Server) =>
  Number(/VmHWM:\s+(\d+)/.exec(procFile(server, "status"))?.[1]) / 1024;

/** Milliseconds from the start of a program to its whole first answer. */
async function startTime(starting: () => Promise<Server>, ask: (at: Server) => Promise<unknown>) {
  const started = performance.now();
  const server = await starting();
  if (!(await ask(server))) throw new Error("no answer after a start");
  const milliseconds = performance.now() - started;
  server.process.kill("SIGKILL");
  await server.process.exited;
  return milliseconds;
}

async function coldStarts(): Promise<void> {
  const { port, release } = reservePort();
  release();
  const [cwd, variables] = [temporaryDirectory(), { ISSUER: `http://127.0.0.1:${port}` }];
  const startProgram = () => start([join(root, "idp.ts")], variables, cwd);
  const startBare = () => startFloor("a");
  const askBare = ({ url }: Server) => send(url);
  await startTime(startProgram, obtain); // it makes the keys
  const [bare, token]: [number[], number[]] = [[], []];
  for (let round = 0; round < Math.min(9, 2 * rounds); round++) {
    bare.push(await startTime(startBare, askBare));
    token.push(await startTime(startProgram, obtain));
  }
  const [ofBare, ofToken] = [bare, token].map((times) => median(times).toFixed(0));
  console.log(`Start to first token: ${ofToken} ms (goal: 60); of floor (a): ${ofBare} ms.`);
}

// --- Table ---------------------------------------------------------------------------------------

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return (sorted[sorted.length >> 1]! + sorted[(sorted.length - 1) >> 1]!) / 2;
}

/** Medians of the rounds; a ratio is the median of the ratios to the floor of each round. */
function printTable(rows: Row[]): void {
  const memoryOfB = peakMegabytes(rows[0]!.server);
  const cpus = ({ turns }: Row) => turns.map((turn) => turn.cpuMicroseconds / turn.count);
  const shown = rows.map((row) => {
    const { name, server, turns, floor, goal } = row;
    const floors = floor ? cpus(floor) : [];
    const ratios = floor ? cpus(row).map((cpu, round) => cpu / floors[round]!) : [];
    const spread = [median(ratios), Math.min(...ratios), Math.max(...ratios)];
    const [ratio, from, to] = spread.map((value) => (floor ? value.toFixed(2) : ""));
    const rate = median(turns.map(({ count, seconds }) => count / seconds)).toFixed(0);
    const memory = (peakMegabytes(server) / memoryOfB).toFixed(2);
    const errors = turns.reduce((sum, turn) => sum + turn.errors, 0);
    const cpu = median(cpus(row)).toFixed(1);
    const cells = { "CPU µs": cpu, "of floor": ratio, from, to, goal: goal ?? "" };
    return { "": name, ...cells, "requests/s": rate, "peak memory of (b)": memory, errors };
  });
  console.table(shown);
}

const cores = `${availableParallelism()} cores for servers and load`;
console.log(`Bun ${Bun.version}, ES256, ${cores}, ${connections} connections.`);
console.log(`Medians of ${rounds} rounds with turns of ${seconds} s.\n`);
const table = postgresUrl ? await postgres() : undefined;
const databases = { SQLite: undefined, ...(table && { PostgreSQL: table.url }) };
const rows = [...(await tokenRows(databases)), ...(await apiRows())];
await measure(rows);
printTable(rows);
await coldStarts();
for (const server of servers) server.process.kill("SIGKILL");
await table?.close();
const errors = rows.flatMap(({ turns }) => turns).reduce((sum, turn) => sum + turn.errors, 0);
console.log(`${errors} errors, ${Math.round(performance.now() / 1000)} s.`);
process.exit(errors ? 1 : 0);
