/**
 * Measures the real programs over http on loopback, in ratios to floors (test/floors.ts) that take
 * turns with them in the same rounds: what else the machine does cancels out.
 *
 *   bun run bench [tokens] [api] [log] [start] [growth] [memory]    without a name: all of them
 *     --rounds=5 --seconds=1     how often, and how long at a time (log and growth: half of it)
 *     --connections=32           of the load, each with one request at a time
 *     --requests=100000          to a server of the memory part; a quarter of it with proofs
 *     --load=bun                 from the load loop of its own, although there is wrk
 *
 * Exit code 1 if an answer was not what it should be.
 */

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as jose from "jose";
import { authorizationServer } from "../config.ts";
import { type Figures, run } from "./load.ts";
import { freeOrigin, root } from "./support.ts";

// --- Data ----------------------------------------------------------------------------------------

/** With a body it is a POST, else a GET. */
type HttpRequest = { path: string; headers: Record<string, string>; body?: string };
type Child = Bun.Subprocess<"ignore", "ignore", "pipe">;
/** `startedAt` as of performance.now(). */
type Server = { origin: string; process: Child; startedAt: number };

interface Load {
  /** Requests for one run that sends about so many. */
  requests: (count: number) => Promise<HttpRequest[]>;
  /** What the body of the first answer must be like. */
  expects: RegExp;
  /** A request is accepted once, and not for long: a run ends by count, not by time. */
  isOnce?: boolean;
  connections?: number;
}

/** A line of a table. Ours have a server each, so that its peak memory is theirs alone. */
interface Row extends Load {
  name: string;
  server: Server;
  /** What its rate is divided by, one for each column of ratios. */
  comparedWith?: (Row | undefined)[];
}

const string = (value: string) => ({ type: "string", default: value }) as const;
const { values: flags, positionals: asked } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: string("5"),
    seconds: string("1"),
    connections: string("32"),
    requests: string("100000"),
    load: string(Bun.which("wrk") ? "wrk" : "bun"),
  },
});
const rounds = Number(flags.rounds);
const seconds = Number(flags.seconds);
const startsMeasured = 7;
const maxRequestsOfOneRun = 20_000; // proofs are valid for 90 s: made, and used, well within that

/** All programs go by these two; where one listens is another matter (start's environment). */
const issuer = freeOrigin();
const resource = freeOrigin();
const clientKey = await jose.generateKeyPair("ES256");
const publicJwk = await jose.exportJWK(clientKey.publicKey);
const directory = mkdtempSync(join(tmpdir(), "oauth-bench-"));
const servers = new Set<Server>();
let errors = 0;

// --- Parts ---------------------------------------------------------------------------------------

/** Tokens issued and API calls. */
async function traffic(): Promise<void> {
  const idp = await startIdp({ origin: issuer });
  const bare = await startFloor("a");
  const rows: Row[] = [];
  if (isAsked("tokens")) rows.push(...(await tokenRows(idp, bare)));
  if (isAsked("api")) rows.push(...(await apiRows(idp, bare)));
  const results = await measure(rows, seconds);
  printMedians("Tokens and API calls", ["of (a)", "of (b)", "of (c)"], results);
  console.log(`Floors get the same requests: (a) a bare Bun.serve answers "hi"; (b) reads the POST,
signs a fixed claims set with jose, answers it; (c) verifies the token with jose, answers "ok".
Goals: secret ≥ 0.92 of (b); one token ≥ 0.70 of (a); fresh token ≥ 0.90 of (c); p99 ≤ 4 × p50;
peak memory ≤ 80 MB.`);
}

async function tokenRows(idp: Server, bare: Server): Promise<Row[]> {
  const load = withSecret();
  const a: Row = { ...load, name: "floor (a), POST", server: bare, expects: /^hi$/ };
  const b: Row = { ...load, name: "floor (b)", server: await startFloor("b"), expects: /^ey/ };
  const ours = { comparedWith: [a, b] };
  return [
    a,
    { name: "token, secret", server: idp, ...load, ...ours },
    b,
    { name: "token, private_key_jwt", server: await startIdp(), ...withAssertion(), ...ours },
    { name: "token, DPoP", server: await startIdp(), ...withProof(), ...ours },
  ];
}

async function apiRows(idp: Server, bare: Server): Promise<Row[]> {
  const tokens = await obtain(idp, 4_000);
  const [one, fresh, bound] = [
    withToken(tokens[0]!),
    withFreshTokens(tokens),
    await withBound(idp),
  ];
  const key = JSON.stringify(await signingJwk(idp, tokens[0]!));
  const verifies = { ...withFreshTokens(tokens), server: await startFloor("c", { KEY: key }) };
  const a: Row = { ...one, name: "floor (a), GET", server: bare, expects: /^hi$/ };
  const c: Row = { ...verifies, name: "floor (c)", expects: /^ok$/ };
  const ours = { comparedWith: [a, undefined, c] };
  return [
    a,
    { name: "API, one token", server: await startApi(), ...one, ...ours },
    c,
    { name: "API, fresh token each", server: await startApi(), ...fresh, ...ours },
    { name: "API, DPoP", server: await startApi(), ...bound, ...ours },
  ];
}

async function log(): Promise<void> {
  const silent = await startIdp({ env: { LOG: "off" } });
  const off: Row = { name: "token, LOG=off", server: silent, ...withSecret() };
  const on: Row = { name: "token, log on", server: await startIdp(), ...withSecret() };
  const results = await measure([off, { ...on, comparedWith: [off] }], seconds / 2);
  printMedians("Cost of the log", ["of off"], results);
}

async function growth(): Promise<void> {
  const idp = await startIdp({ origin: issuer, scopes: 50 });
  const [few, many] = [await obtain(idp, 2_500), await obtain(idp, 2_500, scopesOf(50))];
  const tokensWith = (scopes: number) => (scopes === 1 ? few : many);
  const connections = [1, 8, 64, 512];
  const rows = [
    await grow("token, clients:", [1, 100, 10_000], async (clients) => {
      return { server: await startIdp({ clients }), ...withSecret(`client${clients}`) };
    }),
    await grow("token, connections:", connections, async (connections) => {
      return { server: await startIdp(), ...withSecret(), connections };
    }),
    await grow("API, one token, connections:", connections, async (connections) => {
      return { server: await startApi(), ...withToken(few[0]!), connections };
    }),
    await grow("token, scopes:", [1, 50], async (scopes) => {
      return { server: await startIdp({ scopes }), ...withSecret("client1", scopesOf(scopes)) };
    }),
    await grow("API, one token, scopes:", [1, 50], async (scopes) => {
      return { server: await startApi(), ...withToken(tokensWith(scopes)[0]!) };
    }),
    await grow("API, fresh token each, scopes:", [1, 50], async (scopes) => {
      return { server: await startApi(), ...withFreshTokens(tokensWith(scopes)) };
    }),
  ];
  printMedians("Growth", ["of first"], await measure(rows.flat(), seconds / 2));
}

/** A row for each level, compared with the first. */
async function grow(
  name: string,
  levels: number[],
  make: (level: number) => Promise<Load & { server: Server }>,
): Promise<Row[]> {
  const rows: Row[] = [];
  for (const level of levels) {
    const load = await make(level);
    rows.push({ name: `${name} ${whole(level)}`, ...load, comparedWith: rows.slice(0, 1) });
  }
  return rows;
}

/** From the start of a process, with nothing changed, to the whole first answer. */
async function startUp(): Promise<void> {
  const place = newDirectory();
  const load = withSecret("client");
  const ours = () => start([join(root, "idp.ts")], issuer, {}, place);
  const starts = [
    { name: "floor (a)", launch: () => startFloor("a"), times: [] as number[], expects: /^hi$/ },
    { name: "token, existing keys", launch: ours, times: [] as number[], expects: load.expects },
  ];
  for (let round = 0; round <= startsMeasured; round++) {
    for (const { name, launch, times, expects } of starts) {
      progress(`start-up: ${name}`);
      const server = await launch();
      await checkAnswer({ ...load, name, server, expects });
      if (round > 0) times.push(performance.now() - server.startedAt); // the first made the keys
      await stopAll("SIGTERM"); // properly, as operators do
    }
  }
  const head = [`first answer, ms, of ${startsMeasured} starts`, "median", "min", "max"];
  const lines = starts.map(({ name, times }) => {
    return [name, ...[median(times), Math.min(...times), Math.max(...times)].map(whole)];
  });
  print("Start-up", head, lines);
  console.log("Goal: the first token within 60 ms.");
}

/** Resident memory while requests go on: what is kept of past ones would show. */
async function memory(): Promise<void> {
  const requests = Number(flags.requests);
  const idp = await startIdp({ origin: issuer });
  const fresh = withFreshTokens(await obtain(idp, 4_000));
  const rows: Row[] = [
    { name: "token, secret", server: await startIdp(), ...withSecret() },
    { name: "token, DPoP", server: await startIdp(), ...withProof() },
    { name: "API, fresh token each", server: await startApi(), ...fresh },
    { name: "API, DPoP", server: await startApi(), ...(await withBound(idp)) },
  ];
  const lines: string[][] = [];
  for (const row of rows) lines.push(await watchMemory(row, requests / (row.isOnce ? 4 : 1)));
  const head = ["MB resident after", "requests", "10 %", "50 %", "100 %", "peak", "100 % by 50 %"];
  print("Memory", head, lines);
  console.log(
    "Goal: flat, but for the 50,000 used proofs and 1,000 tokens that the API remembers.",
  );
}

async function watchMemory(row: Row, requests: number): Promise<string[]> {
  await checkAnswer(row);
  const sizes: number[] = [];
  for (let sent = 0, tenth = 1; tenth <= 10; tenth++) {
    progress(`memory: ${row.name}, ${tenth}0 %`);
    while (sent < Math.ceil((requests * tenth) / 10)) {
      const count = Math.min(maxRequestsOfOneRun, Math.ceil((requests * tenth) / 10) - sent);
      await runOnce(row, 60, count);
      sent += count;
    }
    sizes.push(megabytes(row.server, "VmRSS"));
  }
  const [at10, at50, at100] = [sizes[0]!, sizes[4]!, sizes[9]!];
  const shown = [requests, at10, at50, at100, megabytes(row.server, "VmHWM")].map(whole);
  return [row.name, ...shown, (at100 / at50).toFixed(2)];
}

// --- Loads ---------------------------------------------------------------------------------------

const scopesOf = (count: number) =>
  ["api1", ...Array.from({ length: count - 1 }, (_, n) => `area${n + 2}.read`)].join(" ");

function tokenRequest(headers: Record<string, string>, parameters: Record<string, string>) {
  const type = { "content-type": "application/x-www-form-urlencoded" };
  const body = new URLSearchParams({ grant_type: "client_credentials", ...parameters });
  return { path: "/connect/token", headers: { ...type, ...headers }, body: `${body}` };
}

const basic = (client_id: string) => ({ authorization: `Basic ${btoa(`${client_id}:secret`)}` });

function withSecret(client_id = "client1", scope = "api1"): Load {
  const request = tokenRequest(basic(client_id), { scope });
  return { requests: async () => [request], expects: /"token_type":"Bearer"/ };
}

function withAssertion(): Load {
  const client_assertion_type = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
  const requests = makeMany(async () => {
    const claims = { iss: "client1", sub: "client1", aud: issuer, jti: crypto.randomUUID() };
    const jwt = new jose.SignJWT(claims).setIssuedAt().setExpirationTime("5 minutes");
    jwt.setProtectedHeader({ alg: "ES256" });
    const client_assertion = await jwt.sign(clientKey.privateKey);
    return tokenRequest({}, { client_assertion_type, client_assertion, scope: "api1" });
  });
  return { requests, expects: /"token_type":"Bearer"/, isOnce: true };
}

function withProof(): Load {
  const requests = makeMany(async () => {
    const dpop = await proof({ htm: "POST", htu: `${issuer}/connect/token` });
    return tokenRequest({ ...basic("client1"), dpop }, { scope: "api1" });
  });
  return { requests, expects: /"token_type":"DPoP"/, isOnce: true };
}

const identity = (headers: Record<string, string>) => ({ path: "/identity", headers });

function withToken(accessToken: string): Load {
  const request = identity({ authorization: `Bearer ${accessToken}` });
  return { requests: async () => [request], expects: /"type":"client_id"/ };
}

/** For one row: half of them in one run, half in the next, each forgotten when it comes again. */
function withFreshTokens(tokens: string[]): Load {
  const all = tokens.map((token) => identity({ authorization: `Bearer ${token}` }));
  let runs = 0;
  const requests = async () => all.slice(...(runs++ % 2 ? [all.length / 2] : [0, all.length / 2]));
  return { requests, expects: /"type":"client_id"/ };
}

async function withBound(idp: Server): Promise<Load> {
  const [request] = (await withProof().requests(1)) as [HttpRequest];
  const { access_token } = JSON.parse(await send(idp, request));
  const ath = Bun.SHA256.hash(access_token, "base64url");
  const requests = makeMany(async () => {
    const dpop = await proof({ htm: "GET", htu: `${resource}/identity`, ath });
    return identity({ authorization: `DPoP ${access_token}`, dpop });
  });
  return { requests, expects: /"type":"client_id"/, isOnce: true };
}

async function proof(claims: Record<string, string>): Promise<string> {
  const jwt = new jose.SignJWT({ ...claims, jti: crypto.randomUUID() }).setIssuedAt();
  jwt.setProtectedHeader({ alg: "ES256", typ: "dpop+jwt", jwk: publicJwk });
  return await jwt.sign(clientKey.privateKey);
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

async function obtain(idp: Server, count: number, scope = "api1"): Promise<string[]> {
  const request = tokenRequest(basic("client1"), { scope });
  const answers = await makeMany(() => send(idp, request))(count);
  return answers.map((answer) => JSON.parse(answer).access_token);
}

async function signingJwk(idp: Server, accessToken: string): Promise<jose.JWK | undefined> {
  const path = "/.well-known/openid-configuration/jwks";
  const { keys }: { keys: jose.JWK[] } = JSON.parse(await send(idp, { path, headers: {} }));
  return keys.find(({ kid }) => kid === jose.decodeProtectedHeader(accessToken).kid);
}

// --- Measuring -----------------------------------------------------------------------------------

/** The figures of each round, by row. In a round the rows take turns; a first one warms them up. */
async function measure(rows: Row[], runSeconds: number): Promise<Map<Row, Figures[]>> {
  const results = new Map<Row, Figures[]>(rows.map((row) => [row, []]));
  const counts = new Map<Row, number>();
  for (let round = 0; round <= rounds; round++) {
    for (const row of rows) {
      progress(`${row.name}, ${round ? `round ${round} of ${rounds}` : "warming up"}`);
      if (round === 0) await checkAnswer(row);
      const count = row.isOnce ? (counts.get(row) ?? 2_000) : undefined;
      const figures = await runOnce(row, count ? 30 : round ? runSeconds : 1, count);
      // By the rate of this run, the next one takes its seconds.
      counts.set(row, Math.min(maxRequestsOfOneRun, Math.ceil(runSeconds * rateOf(figures))));
      if (round > 0) results.get(row)!.push(figures);
    }
  }
  return results;
}

const rateOf = ({ requests, seconds }: Figures) => requests / seconds;

/** One run of load. All errors count, also those while warming up. */
async function runOnce(row: Row, seconds: number, count = -1): Promise<Figures> {
  const { connections = Number(flags.connections), server } = row;
  const requests = (await row.requests(Math.max(1, count))).map(asText);
  const load = { origin: server.origin, requests, connections, seconds, count };
  const figures = await run(load, directory, flags.load === "wrk");
  if (!figures.requests) throw new Error(`${row.name}: no answers`);
  errors += figures.errors;
  return figures;
}

function asText({ path, headers, body }: HttpRequest): string {
  const length = body === undefined ? {} : { "content-length": `${body.length}` };
  const fields = Object.entries({ host: "localhost", ...headers, ...length });
  const lines = fields.map(([name, value]) => `${name}: ${value}\r\n`).join("");
  return `${body === undefined ? "GET" : "POST"} ${path} HTTP/1.1\r\n${lines}\r\n${body ?? ""}`;
}

/** The load generator looks at the status alone; this looks at what is answered. */
async function checkAnswer({ name, server, requests, expects }: Row): Promise<void> {
  const [request] = (await requests(1)) as [HttpRequest];
  const text = await send(server, request);
  if (!expects.test(text)) throw new Error(`${name}: unexpected answer ${text}`);
}

/** The body of a successful answer. */
async function send({ origin }: Server, { path, headers, body }: HttpRequest): Promise<string> {
  const request = body === undefined ? { headers } : { method: "POST", headers, body };
  const answer = await fetch(origin + path, request);
  const text = await answer.text();
  if (answer.ok) return text;
  throw new Error(`${path}: ${answer.status} ${text}`);
}

/** VmRSS (resident now) or VmHWM (its peak), as Linux tells; elsewhere NaN. */
function megabytes({ process: { pid } }: Server, field: "VmRSS" | "VmHWM"): number {
  if (process.platform !== "linux") return NaN;
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  return Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(status)?.[1]) / 1024;
}

// --- Servers -------------------------------------------------------------------------------------

type Env = Record<string, string>;
type IdpOptions = { origin?: string; place?: string; clients?: number; scopes?: number; env?: Env };

/** Of clients client1, client2, … each has the usual secret and all scopes, the first a key too. */
async function startIdp(options: IdpOptions = {}): Promise<Server> {
  const { origin = freeOrigin(), place = newDirectory(), clients = 1, scopes = 1, env } = options;
  const scope = scopesOf(scopes);
  const usual = { ...authorizationServer.clients[0], scope };
  const named = Array.from({ length: clients }, (_, n) => ({
    ...usual,
    client_id: `client${n + 1}`,
  }));
  const changes = {
    scopes: scope.split(" ").map((name) => ({ scope: name, description: name, resource })),
    clients: [{ ...named[0], jwks: { keys: [publicJwk] } }, ...named.slice(1)],
  };
  // In files: the environment has no room for thousands of clients.
  await Bun.write(join(place, "changes.json"), JSON.stringify(changes));
  const preload = join(place, "configure.ts");
  const code = `import { authorizationServer } from ${JSON.stringify(join(root, "config.ts"))};
    import changes from "./changes.json";
    Object.assign(authorizationServer, changes);`;
  await Bun.write(preload, code);
  const command = ["--preload", preload, join(root, "idp.ts")];
  return await start(command, origin, { ISSUER_LISTEN: new URL(origin).host, ...env }, place);
}

async function startApi(): Promise<Server> {
  const origin = freeOrigin();
  return await start([join(root, "api.ts")], origin, { API_LISTEN: new URL(origin).host });
}

async function startFloor(floor: "a" | "b" | "c", env: Env = {}): Promise<Server> {
  const origin = freeOrigin();
  return await start([join(root, "test/floors.ts"), floor, new URL(origin).port], origin, env);
}

const newDirectory = () => mkdtempSync(join(directory, "server-"));

/** Starts a server, its log going to /dev/null, and waits for the line that says it is up. */
async function start(command: string[], origin: string, more: Env, cwd = newDirectory()) {
  const { PATH = "", HOME = "" } = process.env;
  const env = { PATH, HOME, ISSUER: issuer, API_URL: resource, ...more };
  const io = { stdin: "ignore", stdout: "ignore", stderr: "pipe" } as const;
  const startedAt = performance.now();
  const child = Bun.spawn([process.execPath, ...command], { cwd, env, ...io });
  const server: Server = { origin, process: child, startedAt };
  servers.add(server);
  const { value } = await child.stderr.getReader().read();
  const line = new TextDecoder().decode(value);
  if (!/^(authorization server|API|floor)/.test(line)) throw new Error(`${command}: ${line}`);
  return server;
}

async function stopAll(signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
  for (const server of servers) server.process.kill(signal);
  await Promise.all([...servers].map((server) => server.process.exited));
  servers.clear();
}

// --- Tables --------------------------------------------------------------------------------------

const whole = (value: number) => Math.round(value).toLocaleString("en");

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return (sorted[sorted.length >> 1]! + sorted[(sorted.length - 1) >> 1]!) / 2;
}

/** Medians of the rounds; a ratio is the median of the ratios of each round. */
function printMedians(title: string, ratios: string[], results: Map<Row, Figures[]>): void {
  const lines = [...results].map(([row, runs]) => {
    const compared = ratios.map((_, column) => {
      const others = results.get(row.comparedWith?.[column] ?? row)!;
      if (others === runs) return "";
      const all = runs.map((figures, round) => rateOf(figures) / rateOf(others[round]!));
      return median(all).toFixed(3);
    });
    const p50 = median(runs.map((figures) => figures.p50Milliseconds));
    const p99 = median(runs.map((figures) => figures.p99Milliseconds));
    const latency = [p50.toFixed(2), p99.toFixed(2), (p99 / p50).toFixed(1)];
    const failed = runs.reduce((sum, figures) => sum + figures.errors, 0);
    const rest = [megabytes(row.server, "VmHWM"), failed].map(whole);
    return [row.name, whole(median(runs.map(rateOf))), ...compared, ...latency, ...rest];
  });
  const head = ["", "requests/s", ...ratios, "p50 ms", "p99 ms", "p99/p50", "peak MB", "errors"];
  print(title, head, lines);
}

function print(title: string, head: string[], lines: string[][]): void {
  progress("");
  const cells = [head, ...lines];
  const widths = head.map((_, column) => Math.max(...cells.map((line) => line[column]!.length)));
  const show = (line: string[]) => {
    const padded = line.map((cell, n) => (n ? cell.padStart(widths[n]!) : cell.padEnd(widths[n]!)));
    return padded.join("  ");
  };
  console.log(`\n${title}\n\n${cells.map(show).join("\n")}\n`);
}

/** On a terminal, what is going on, in one line that the next one replaces. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
}

// --- Start ---------------------------------------------------------------------------------------

const parts = { tokens: traffic, api: traffic, log, start: startUp, growth, memory };

function isAsked(part: string): boolean {
  return asked.length === 0 || asked.includes(part);
}

process.on("exit", () => {
  for (const server of servers) server.process.kill("SIGKILL");
  rmSync(directory, { recursive: true, force: true });
});
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(1));

try {
  for (const [flag, value] of Object.entries(flags)) {
    if (flag !== "load" && !(Number(value) > 0)) throw new Error(`--${flag} must be a number`);
  }
  const unknown = asked.find((part) => !(part in parts));
  if (unknown) throw new Error(`no part ${unknown}, but ${Object.keys(parts).join(", ")}`);
  const from = flags.load === "wrk" ? "wrk" : "the load loop of its own";
  const machine = `Bun ${Bun.version}, ${availableParallelism()} cores for servers and load`;
  const load = `load from ${from}, ${flags.connections} connections`;
  console.log(`${machine}, ${load}, medians of ${rounds} rounds, log on.`);
  const chosen = Object.entries(parts).filter(([part]) => isAsked(part));
  for (const part of new Set(chosen.map(([, measured]) => measured))) {
    await part();
    await stopAll();
  }
  console.log(`\n${errors} errors, ${Math.round(performance.now() / 1000)} s.`);
  process.exit(errors ? 1 : 0);
} catch (error) {
  progress("");
  console.error(`error: ${(error as Error).message}`);
  process.exit(1);
}
