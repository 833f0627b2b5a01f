/**
 * Tries for about five minutes to break the programs: hostile input, bytes on the wire, load,
 * guesses, faults of the issuer, kill -9, SIGTERM, a full disk, a clock that steps. Loopback only.
 *
 * Run: bun run soak [part …] [--seed=N]   (without a part: all of them; see `parts` at the end)
 * The seed makes the same requests again. Prints a table; exit code 1 if a promise was broken.
 */

import { Database } from "bun:sqlite";
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import { authorizationServer } from "../config.ts";
import {
  type Answer,
  attack,
  callRequest,
  confidential,
  Connection,
  encode,
  type Fault,
  faults,
  FakeIssuer,
  hostileClients,
  hostileRequest,
  pair,
  proofFor,
  proofThumbprint,
  Random,
  type Tally,
  tokenFor,
  tokenRequest,
} from "./hostile.ts";
import { cleanUp, type Changes, eventually, freeOrigin, launch } from "./support.ts";
import { Program, root, temporaryDirectory } from "./support.ts";

const flags = process.argv.slice(2);
const wanted = flags.filter((flag) => !flag.startsWith("--"));
const given = flags.find((flag) => flag.startsWith("--seed="))?.slice(7);
const seed = Number(given ?? Math.floor(Math.random() * 1_000_000));
const random = new Random(seed);
const secondsNow = () => Math.floor(Date.now() / 1000);
const repeat = <Value>(count: number, make: (index: number) => Value) =>
  Array.from({ length: count }, (_, index) => make(index));

// --- The table -----------------------------------------------------------------------------------

interface Row {
  promise: string;
  attack: string;
  count: number;
  outcome: string;
  problems: string[];
}
const rows: Row[] = [];

/** Adds a row; problems are what broke the promise, each as a line. */
function report(promise: string, how: string, count: number, outcome: string, problems: string[]) {
  rows.push({ promise, attack: how, count, outcome, problems });
  console.error(`${problems.length ? "BROKEN" : "held"}: ${promise}: ${outcome}`);
  for (const problem of problems.slice(0, 20)) console.error(`  ${problem}`);
}

function printTable(): void {
  const lines = rows.map(({ promise, attack, count, outcome, problems }) => {
    const result = problems.length ? `BROKEN (${problems.length}): ${problems[0]}` : outcome;
    return `| ${promise} | ${attack} | ${count.toLocaleString("en")} | ${result.slice(0, 300)} |`;
  });
  console.log(`\n| Promise | Attack | Times | What happened |\n| --- | --- | --- | --- |`);
  console.log(lines.join("\n"));
}

const signed = (value: number) => `${value < 0 ? "" : "+"}${value}`;

/** How often each value came, as text. */
function histogram(values: (string | number)[]): string {
  const counts = new Map<string | number, number>();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].map(([value, count]) => `${count.toLocaleString("en")} × ${value}`).join(", ");
}

// --- Programs ------------------------------------------------------------------------------------

/** All output of the servers, as it comes: none of this may be in it. */
const forbidden = [/eyJ[\w-]{8,}/, /"d"\s*:\s*"/, /PRIVATE KEY/];
confidential.push(btoa("client:secret"));
const leaks: string[] = [];
let scanned = 0;
/** Tokens that a server says it issued. */
const issued = new Map<Program, number>();
let watchedCount = 0;
const watched: { program: Program; streams: ("stdout" | "stderr")[] }[] = [];

function scan(final = false): void {
  for (const { program, streams } of watched) {
    for (const stream of streams) {
      const end = final ? Infinity : program[stream].lastIndexOf("\n") + 1;
      const text = program[stream].slice(0, end);
      if (stream === "stdout") program.stdout = program.stdout.slice(text.length);
      issued.set(program, (issued.get(program) ?? 0) + text.split('"token issued"').length - 1);
      scanned += stream === "stdout" ? text.length : 0;
      const found = [
        ...forbidden.map((pattern) => pattern.exec(text)?.[0]),
        ...confidential.filter((secret) => text.includes(secret)),
      ];
      leaks.push(...found.filter((leak) => leak !== undefined));
    }
  }
}
const scanning = setInterval(scan, 100);

function watch(program: Program, streams: ("stdout" | "stderr")[] = ["stdout", "stderr"]): Program {
  watchedCount += 1;
  watched.push({ program, streams });
  return program;
}

interface Started {
  program: Program;
  origin: string;
  cwd: string;
}

interface IdpOptions {
  origin?: string;
  resource?: string;
  cwd?: string;
  env?: Record<string, string>;
  changes?: NonNullable<Changes["authorizationServer"]>;
}

async function startIdp(options: IdpOptions = {}): Promise<Started> {
  const { origin = freeOrigin(), resource = "http://127.0.0.1:9", env } = options;
  const cwd = options.cwd ?? temporaryDirectory();
  const changes = { authorizationServer: { ...hostileClients(resource), ...options.changes } };
  const all = { ISSUER: origin, API_URL: resource, ...env };
  const program = watch(launch("idp", { cwd, env: all, changes }));
  await program.printed(/authorization server/);
  return { program, origin, cwd };
}

async function startApi(
  issuer: string,
  changes: NonNullable<Changes["resourceServer"]> = {},
  origin = freeOrigin(),
  env: Record<string, string> = {},
): Promise<Started> {
  const cwd = temporaryDirectory();
  const all = { ISSUER: issuer, API_URL: origin, ...env };
  const program = watch(launch("api", { cwd, env: all, changes: { resourceServer: changes } }));
  await program.printed(/API/);
  return { program, origin, cwd };
}

async function end(...started: Started[]): Promise<void> {
  for (const { program } of started) await program.stop();
}

/**
 * A free origin for a server that ends and comes back: not of the ports that the system gives to
 * outgoing connections, one of which could take it meanwhile.
 */
function lastingOrigin(): string {
  for (;;) {
    const port = 20_000 + random.below(10_000);
    try {
      void Bun.serve({ hostname: "127.0.0.1", port, fetch: () => new Response() }).stop(true);
      return `http://127.0.0.1:${port}`;
    } catch {} // in use: another one
  }
}

/** Megabytes of memory of a process, now or at most so far; 0 where there is no /proc. */
function megabytes({ program }: Started, which: "VmRSS" | "VmHWM" = "VmRSS"): number {
  const file = `/proc/${program.process.pid}/status`;
  if (!existsSync(file)) return 0;
  const kilobytes = new RegExp(`${which}:\\s+(\\d+)`).exec(readFileSync(file, "utf8"))?.[1];
  return Math.round(Number(kilobytes ?? 0) / 1024);
}

const openFiles = ({ program }: Started) => {
  const directory = `/proc/${program.process.pid}/fd`;
  return existsSync(directory) ? readdirSync(directory).length : 0;
};

const isRunning = ({ program }: Started) =>
  program.process.exitCode === null && program.process.signalCode === null;
const gone = (started: Started) =>
  isRunning(started) ? [] : [`the program ended: ${started.program.stderr.slice(-500)}`];

// --- Requests ------------------------------------------------------------------------------------

/** One request on a connection of its own. Status 0 if nobody listens. */
async function once(origin: string, request: string, seconds = 8): Promise<Answer> {
  const connection = await Connection.open(origin).catch(() => undefined);
  if (!connection) return { status: 0, headers: new Map(), body: "" };
  return await connection.send(request, false, seconds).finally(() => connection.close());
}

/** Sends requests one after the other over one connection until the time is over. */
async function loop(origin: string, make: () => string, until: () => boolean): Promise<number[]> {
  const answers: number[] = [];
  let connection = await Connection.open(origin);
  while (!until()) {
    if (connection.closed) connection = await Connection.open(origin);
    answers.push((await connection.send(make())).status);
  }
  connection.close();
  return answers;
}

const accessTokenIn = ({ body }: Answer): string => JSON.parse(body).access_token;

/** Milliseconds that a request takes when nothing else goes on: the median of 50. */
async function latency(origin: string, make: () => string): Promise<number> {
  const connection = await Connection.open(origin);
  const times: number[] = [];
  for (let i = 0; i < 50; i++) {
    const started = performance.now();
    await connection.send(make());
    times.push(performance.now() - started);
  }
  connection.close();
  return times.toSorted((a, b) => a - b)[25]!;
}

// --- Hostile input -------------------------------------------------------------------------------

async function input(): Promise<void> {
  const resource = freeOrigin();
  const idp = await startIdp({ resource });
  await bend("POST /connect/token", idp, { issuer: idp.origin, resource }, 20);
  await end(idp);
  const signer = pair("signer");
  const issuer = new FakeIssuer(signer);
  const api = await startApi(issuer.origin);
  const at = { issuer: issuer.origin, resource: api.origin, signer };
  await bend("GET /identity", api, at, 30);
  await end(api);
  await issuer.stop();
}

async function bend(
  what: string,
  server: Started,
  at: Parameters<typeof attack>[0],
  kinds: number,
): Promise<void> {
  const memory: number[] = [];
  const tally: Tally = await attack(at, seed, 100_000, () => memory.push(megabytes(server)));
  const { problems, sent, accepted, refused, bends, refusals } = tally;
  if (refusals.size > kinds) problems.push(`${refusals.size} different refusals`);
  const kindsSeen = `${accepted} accepted, ${refused} refused in ${refusals.size} constant ways`;
  const attackName = `${bends.size} kinds of bends of valid requests, seed ${seed}`;
  problems.push(...gone(server));
  report(
    `${what}: no 5xx, no hang, nothing reflected, no undue 200`,
    attackName,
    sent,
    kindsSeen,
    problems,
  );
  const [early, late] = [median(memory.slice(20, 40)), median(memory.slice(-20))];
  const grown = late - early > 20 ? [`memory grew from ${early} to ${late} MB`] : [];
  report(`${what}: memory flat`, "the same", sent, `${early} → ${late} MB`, grown);
}

const median = (numbers: number[]) =>
  numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)] ?? 0;

// --- Bytes on the wire ---------------------------------------------------------------------------

async function sockets(): Promise<void> {
  const tls = freeOrigin().replace("http:", "https:");
  const idp = await startIdp();
  const secure = await startIdp({ origin: tls });
  const ca = readFileSync(join(secure.cwd, "keys/localhost.pem"), "utf8");
  const problems: string[] = [];
  const files = openFiles(idp);
  const hello = `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(200)}`;
  const partial = ["", "P", tokenRequest().slice(0, 40), tokenRequest().slice(0, -5)];
  const plainTls = tls.replace("https:", "http:");
  const opening = [
    ...repeat(1_000, async (i) => {
      const connection = await Connection.open(idp.origin);
      connection.write(partial[i % partial.length]!);
      return connection;
    }),
    ...repeat(500, async (i) => {
      const connection = await Connection.open(plainTls);
      connection.write(i % 2 ? hello : "");
      return connection;
    }),
  ];
  const idle = await Promise.all(opening);
  const normal = await Promise.all([
    ...repeat(4, () => sendTimes(idp.origin, 500)),
    ...repeat(4, () => sendTimes(tls, 250, ca)),
  ]);
  const answers = normal.flat();
  if (answers.some((status) => status !== 200)) problems.push(histogram(answers));
  report(
    "A thousand idle connections keep nobody out",
    "1,000 that stop before, in and within a request, 500 half TLS handshakes, then token requests",
    answers.length,
    histogram(answers),
    [...problems, ...gone(idp), ...gone(secure)],
  );

  // Meanwhile: bodies that drip, one byte each 200 ms; and requests with bytes changed anywhere.
  const slow = repeat(50, async () => {
    const request = tokenRequest();
    const connection = await Connection.open(idp.origin);
    const answer = connection.next(false, 15);
    connection.write(request.slice(0, -20));
    for (const byte of request.slice(-20)) {
      await Bun.sleep(200);
      connection.write(byte);
    }
    return (await answer.finally(() => connection.close())).status;
  });
  const broken = repeat(1_000, async (i) => {
    const at = { issuer: idp.origin, resource: "http://127.0.0.1:9" };
    const { bytes } = hostileRequest(at, seed, i);
    const chance = new Random(seed, 1_000_000 + i);
    const connection = await Connection.open(idp.origin);
    const answer = connection.next(false, 15);
    connection.write(chance.mutate(bytes.toString("latin1")));
    return (await answer.finally(() => connection.close())).status;
  });
  const dripped = await Promise.all(slow);
  const slowProblems = dripped.some((status) => status !== 200) ? [histogram(dripped)] : [];
  report("A slow body is waited for", "one byte each 200 ms", 50, histogram(dripped), slowProblems);
  const statuses = await Promise.all(broken);
  const wrong = statuses.filter((status) => status === -1 || (status >= 500 && status !== 505));
  report(
    "Every request ends: answered, or hung up on after 10 s without a byte",
    "bytes changed anywhere, the framing too",
    statuses.length,
    histogram(statuses).replace(/× 0\b/, "× hung up"),
    [...wrong.map((status) => `status ${status}`), ...gone(idp)],
  );
  const waited = secondsNow();
  const closed = () => idle.filter((connection) => connection.closed).length;
  await eventually("idle connections closed", () => closed() === idle.length, 25).catch(() => {});
  const open = idle.length - closed();
  for (const connection of idle) connection.close();
  await Bun.sleep(200);
  const leaked = openFiles(idp) - files;
  report(
    "Idle connections are given up, and nothing of them stays",
    "1,500 connections left alone",
    idle.length,
    `${closed() - open} closed by the server (${secondsNow() - waited} s later), ${leaked} files left open`,
    leaked > 20 ? [`${leaked} files open`] : [],
  );
  await bigBodies(idp);
  await end(idp, secure);
}

async function sendTimes(origin: string, count: number, ca?: string): Promise<number[]> {
  const connection = await Connection.open(origin, ca);
  const answers: number[] = [];
  for (let i = 0; i < count; i++) answers.push((await connection.send(tokenRequest())).status);
  connection.close();
  return answers;
}

/** Bodies of 50 MB to both servers, where none is wanted. */
async function bigBodies(idp: Started): Promise<void> {
  const api = await startApi(idp.origin);
  const before = [megabytes(idp), megabytes(api)];
  const chunk = Buffer.alloc(1 << 20, "a");
  const send = async (origin: string, line: string) => {
    const connection = await Connection.open(origin);
    connection.write(`${line} HTTP/1.1\r\nHost: x\r\nContent-Length: ${50 << 20}\r\n\r\n`);
    const answer = connection.next(false, 15);
    for (let i = 0; i < 50 && !connection.closed; i++) {
      connection.write(chunk);
      await new Promise(setImmediate);
    }
    return (await answer.finally(() => connection.close())).status;
  };
  const targets: [Started, string][] = [
    [idp, "POST /connect/token"],
    [idp, "GET /health"],
    [idp, "POST /nothing"],
    [api, "GET /identity"],
    [api, "POST /identity"],
    [api, "GET /nothing"],
  ];
  const sending = targets.flatMap(([{ origin }, line]) => repeat(5, () => send(origin, line)));
  const answers = await Promise.all(sending);
  await Bun.sleep(200);
  const after = [megabytes(idp, "VmHWM"), megabytes(api, "VmHWM")];
  const grown = after.map((value, i) => value - before[i]!);
  const problems = grown.filter((value) => value > 60).map((value) => `memory grew by ${value} MB`);
  const wrong = answers.filter((status) => status === -1 || status >= 500 || status === 200);
  const healthy = answers.filter((status) => status === 200).length;
  report(
    "A body that nobody wants costs no memory",
    "bodies of 50 MB, 30 at once",
    answers.length,
    `${histogram(answers)}; memory at most ${signed(Math.max(...grown))} MB`,
    [...problems, ...(wrong.length > healthy ? [histogram(wrong)] : [])],
  );
  await end(api);
}

// --- Load ----------------------------------------------------------------------------------------

async function load(): Promise<void> {
  const resource = freeOrigin();
  const idp = await startIdp({ resource });
  const api = await startApi(idp.origin, {}, resource);
  const token = accessTokenIn(await once(idp.origin, tokenRequest()));
  const request = callRequest(token);
  const servers: [Started, string][] = [
    [idp, tokenRequest()],
    [api, request],
  ];
  for (const [{ origin }, text] of servers) await latency(origin, () => text);
  const before = await Promise.all(
    servers.map(([{ origin }, text]) => latency(origin, () => text)),
  );
  const deadline = Date.now() + 30_000;
  const over = () => Date.now() > deadline;
  const memory: number[][] = [[], []];
  const sampling = setInterval(
    () => servers.forEach(([server], i) => memory[i]!.push(megabytes(server))),
    500,
  );
  const running = servers.map(([{ origin }, text]) =>
    Promise.all(repeat(320, () => loop(origin, () => text, over))),
  );
  const answers = (await Promise.all(running)).map((all) => all.flat());
  clearInterval(sampling);
  const after = await Promise.all(servers.map(([{ origin }, text]) => latency(origin, () => text)));
  ["idp.ts", "api.ts"].forEach((name, i) => {
    const refusedOrLost = answers[i]!.filter((status) => status !== 200);
    const problems = [...gone(servers[i]![0])];
    if (refusedOrLost.length) problems.push(histogram(refusedOrLost));
    report(
      `${name}: under load nothing is refused or lost`,
      "320 connections for 30 s",
      answers[i]!.length,
      histogram(answers[i]!),
      problems,
    );
    const [early, late] = [median(memory[i]!.slice(10, 20)), median(memory[i]!.slice(-10))];
    const grown = late - early > 20 ? [`memory grew from ${early} to ${late} MB`] : [];
    report(
      `${name}: memory bounded under load`,
      "the same",
      answers[i]!.length,
      `${early} → ${late} MB, peak ${Math.max(...memory[i]!)} MB`,
      grown,
    );
    const [was, is] = [before[i]!, after[i]!];
    const slower = is > was * 3 + 5 ? [`${was.toFixed(1)} → ${is.toFixed(1)} ms`] : [];
    report(
      `${name}: normal latency right after`,
      "50 requests, median",
      50,
      `${was.toFixed(2)} → ${is.toFixed(2)} ms`,
      slower,
    );
  });
  await end(idp, api);
}

// --- Guesses -------------------------------------------------------------------------------------

async function guesses(): Promise<void> {
  const idp = await startIdp();
  const total = 1_000_000;
  const memory: number[] = [];
  let sent = 0;
  const wrong: number[] = [];
  const guess = async () => {
    const connection = await Connection.open(idp.origin);
    while (sent < total) {
      const from = sent;
      sent += 50;
      const waiting = repeat(50, () => connection.next());
      connection.write(repeat(50, (i) => tokenRequest(`guess ${from + i}`)).join(""));
      const answers = await Promise.all(waiting);
      wrong.push(...answers.map(({ status }) => status).filter((status) => status !== 401));
      if (from % 10_000 === 0) memory.push(megabytes(idp));
    }
    connection.close();
  };
  const times: number[] = [];
  const refused: number[] = [];
  const honest = async () => {
    const connection = await Connection.open(idp.origin);
    while (sent < total) {
      const started = performance.now();
      const { status } = await connection.send(tokenRequest());
      times.push(performance.now() - started);
      if (status !== 200) refused.push(status);
      await Bun.sleep(5);
    }
    connection.close();
  };
  const started = performance.now();
  await Promise.all([...repeat(8, guess), honest()]);
  const seconds = Math.round((performance.now() - started) / 1000);
  const [early, late] = [median(memory.slice(10, 30)), median(memory.slice(-20))];
  const problems = late - early > 20 ? [`memory grew from ${early} to ${late} MB`] : [];
  if (wrong.length) problems.push(histogram(wrong));
  report(
    "A million wrong guesses cost memory nothing",
    "guesses of a client's secret over 8 connections, pipelined",
    sent,
    `all 401 in ${seconds} s; ${early} → ${late} MB`,
    [...problems, ...gone(idp)],
  );
  const slowest = times.toSorted((a, b) => a - b);
  const share = `${times.length} tokens, median ${median(times).toFixed(1)} ms, slowest ${slowest.at(-1)!.toFixed(0)} ms`;
  const late2 = slowest.at(-1)! > 2_000 ? [`a token took ${slowest.at(-1)} ms`] : [];
  report(
    "An honest client has its share meanwhile",
    "a token request each 5 ms",
    times.length,
    share,
    [...refused.map((status) => `status ${status}`), ...late2],
  );
  await end(idp);
}

// --- The issuer misbehaves -----------------------------------------------------------------------

async function issuerFaults(): Promise<void> {
  const names: (Fault | "down")[] = [...(Object.keys(faults) as Fault[]), "down"];
  for (const fault of names) {
    const signer = pair("signer");
    const issuer = new FakeIssuer(signer);
    const api = await startApi(issuer.origin, { refreshSeconds: 0.2, coolDownSeconds: 0.1 });
    const at = { issuer: issuer.origin, resource: api.origin, signer };
    const known = callRequest(encode(tokenFor(at, "client")));
    const stranger = tokenFor(at, "client");
    stranger.header["kid"] = "unknown";
    const unknown = callRequest(encode(stranger));
    const problems: string[] = [];
    const first = (await once(api.origin, known)).status;
    if (first !== 200) problems.push(`before the fault: ${first}`);
    const before = megabytes(api);
    if (fault === "down") await issuer.stop();
    else issuer.fault = fault;
    const fetches = issuer.fetches;
    const deadline = Date.now() + (fault === "silence" ? 7_000 : 1_500);
    const over = () => Date.now() > deadline;
    const fresh = () => callRequest(encode(tokenFor(at, random.word())));
    const [good, strange] = await Promise.all([
      Promise.all([
        ...repeat(4, () => loop(api.origin, () => known, over)),
        ...repeat(4, () => loop(api.origin, fresh, over)),
      ]),
      Promise.all(repeat(4, () => loop(api.origin, () => unknown, over))),
    ]);
    const peak = megabytes(api, "VmHWM") - before;
    issuer.fault = undefined;
    if (fault === "down") issuer.start();
    const healed = async () => (await once(api.origin, unknown)).status === 401;
    await eventually("healed", healed, 12).catch(() => problems.push("does not heal"));
    const lost = good.flat().filter((status) => status !== 200);
    if (lost.length) problems.push(`good tokens: ${histogram(lost)}`);
    const wrong = strange.flat().filter((status) => status !== 401 && status !== 503);
    if (wrong.length) problems.push(`unknown kid: ${histogram(wrong)}`);
    // 1 MiB of brackets is half a million arrays: much, but no more than that.
    if (peak > (fault.startsWith("JSON nested") ? 300 : 80))
      problems.push(`memory grew by ${peak} MB`);
    const counts = `good tokens all 200; unknown kid ${histogram(strange.flat())}`;
    const tried = issuer.fetches - fetches;
    report(
      `The API outlives an issuer that answers: ${fault}`,
      "8 connections with good tokens, 4 with an unknown kid",
      good.flat().length + strange.flat().length,
      `${counts}; ${tried} fetches, memory at most ${signed(peak)} MB`,
      [...problems, ...gone(api)],
    );
    await end(api);
    await issuer.stop();
  }
  await shrinkingSet();
}

/** A key leaves the set: its tokens are refused soon, those of the key that stays never. */
async function shrinkingSet(): Promise<void> {
  const [stays, leaves] = [pair("stays"), pair("leaves")];
  const issuer = new FakeIssuer(stays);
  let keys: unknown[] = [issuer.key, { ...leaves.jwk, alg: "ES256" }];
  const well = issuer.well.bind(issuer);
  issuer.well = (path) => well(path, keys);
  const api = await startApi(issuer.origin, { refreshSeconds: 0.2, coolDownSeconds: 0.1 });
  const at = { issuer: issuer.origin, resource: api.origin };
  const problems: string[] = [];
  let sent = 0;
  for (let round = 0; round < 5; round++) {
    keys = [issuer.key, { ...leaves.jwk, alg: "ES256" }];
    const old = callRequest(encode(tokenFor({ ...at, signer: leaves }, "client")));
    await eventually("both accepted", async () => (await once(api.origin, old)).status === 200);
    keys = [issuer.key];
    let isOver = false;
    const stay = () => callRequest(encode(tokenFor({ ...at, signer: stays }, random.word())));
    const good = Promise.all(repeat(4, () => loop(api.origin, stay, () => isOver)));
    const refused = async () => (await once(api.origin, old)).status === 401;
    await eventually("refused", refused).catch(() =>
      problems.push("a token of a key that is gone"),
    );
    isOver = true;
    const answers = (await good).flat();
    sent += answers.length;
    const lost = answers.filter((status) => status !== 200);
    if (lost.length) problems.push(histogram(lost));
  }
  report(
    "A key that leaves the JWK Set counts no longer, the others do",
    "a set that shrinks and grows, 5 times, under calls",
    sent,
    "tokens of the key that left: 401; of the one that stayed: all 200",
    problems,
  );
  await end(api);
  await issuer.stop();
}

// --- kill -9 -------------------------------------------------------------------------------------

/** A key each second, so that a kill hits the making of one now and then. */
const fastKeys = {
  ...authorizationServer.signingKeys,
  ...{ rotationSeconds: 1, pollSeconds: 0.1, maxAgeSeconds: 0.1 },
  ...{ refreshSeconds: 0.1, coolDownSeconds: 0.1 },
};

async function kills(): Promise<void> {
  const [resource, origin, cwd] = [lastingOrigin(), lastingOrigin(), temporaryDirectory()];
  const changes = { signingKeys: fastKeys };
  const problems: string[] = [];
  const tokens: string[] = [];
  const startAll = () => startIdp({ origin, resource, cwd, changes });
  const rounds = 40;
  for (let round = 0; round < rounds; round++) {
    const idp = await startAll();
    let isOver = false;
    const worker = async () => {
      for (let connection: Connection | undefined; !isOver;) {
        connection ??= await Connection.open(origin).catch(() => undefined);
        const proof = encode(proofFor("POST", `${origin}/connect/token`));
        const fields = random.once(2) ? [`DPoP: ${proof}`] : [];
        const answer = await connection?.send(tokenRequest("secret", ...fields));
        if (answer?.status === 200 && !fields.length) tokens.push(accessTokenIn(answer));
        if (answer && answer.status >= 500) problems.push(`status ${answer.status} ${answer.body}`);
        if (!answer?.status) connection = undefined;
      }
    };
    const load = Promise.all(repeat(8, worker));
    await Bun.sleep(random.below(600));
    await idp.program.stop("SIGKILL");
    isOver = true;
    await load;
  }
  const idp = await startAll();
  const jwks = await (await fetch(`${origin}/.well-known/openid-configuration/jwks`)).json();
  const published = new Set((jwks as { keys: jose.JWK[] }).keys.map(({ kid }) => kid));
  const signed = new Set(tokens.map((token) => jose.decodeProtectedHeader(token).kid!));
  const lost = [...signed].filter((kid) => !published.has(kid));
  if (lost.length) problems.push(`${lost.length} keys lost`);
  const api = await startApi(origin, {}, resource);
  const statuses: number[] = [];
  const connection = await Connection.open(api.origin);
  for (const token of tokens.slice(0, 5_000)) {
    statuses.push((await connection.send(callRequest(token))).status);
  }
  connection.close();
  if (statuses.some((status) => status !== 200)) problems.push(`tokens: ${histogram(statuses)}`);
  report(
    "kill -9 of idp.ts loses no key, and its tokens stay good",
    "at random instants, a new key each second, 8 clients",
    rounds,
    `${tokens.length} tokens of ${signed.size} keys, all published; at the API ${histogram(statuses)}`,
    problems,
  );

  const apiProblems: string[] = [];
  let current = api;
  for (let round = 0; round < 10; round++) {
    let isOver = false;
    const calls = Promise.all(
      repeat(4, async () => {
        while (!isOver) {
          const { status } = await once(current.origin, callRequest(tokens[0]!));
          if (status >= 500 && status !== 503) apiProblems.push(`status ${status}`);
        }
      }),
    );
    await Bun.sleep(random.below(300));
    await current.program.stop("SIGKILL");
    isOver = true;
    await calls;
    current = await startApi(origin, {}, resource);
    const { status } = await once(current.origin, callRequest(tokens[0]!));
    if (status !== 200) apiProblems.push(`after a restart: ${status}`);
  }
  report(
    "kill -9 of api.ts costs nothing",
    "at random instants",
    10,
    "200 after each restart",
    apiProblems,
  );
  await killedClients({ ISSUER: origin, API_URL: resource });
  await end(idp, current);
  await killedAtBirth();
}

async function killedClients(env: Record<string, string>): Promise<void> {
  const problems: string[] = [];
  for (let round = 0; round < 10; round++) {
    const client = watch(launch("client", { env }), ["stderr"]);
    await Bun.sleep(random.below(200));
    await client.stop("SIGKILL");
  }
  const client = watch(launch("client", { env }), ["stderr"]);
  if ((await client.ended()) !== 0) problems.push(client.stderr);
  report(
    "kill -9 of client.ts costs nothing",
    "at random instants",
    10,
    "the next run: exit code 0",
    problems,
  );
}

/** Killed while the first key and the certificate are made: the next start goes on from there. */
async function killedAtBirth(): Promise<void> {
  const problems: string[] = [];
  const rounds = 15;
  let kept = 0;
  for (let round = 0; round < rounds; round++) {
    const cwd = temporaryDirectory();
    const origin = freeOrigin().replace("http:", "https:");
    const env = { ISSUER: origin, API_URL: "http://127.0.0.1:9" };
    const born = watch(launch("idp", { cwd, env }));
    await Bun.sleep(random.below(160));
    await born.stop("SIGKILL");
    const before = keyRows(join(cwd, "keys/keys.db"));
    const again = watch(launch("idp", { cwd, env }));
    await again.printed(/server/).catch(({ message }: Error) => problems.push(message));
    const after = keyRows(join(cwd, "keys/keys.db"));
    kept += before.length;
    if (after.length !== 2) problems.push(`${after.length} keys`);
    for (const row of before) if (!after.includes(row)) problems.push("a key is gone");
    await again.stop();
  }
  report(
    "kill -9 during the first start leaves nothing broken",
    "at random instants",
    rounds,
    `each next start has 2 keys; ${kept} were there already`,
    problems,
  );
}

/** The rows of the keys, as text; none where there is no table yet. */
function keyRows(file: string): string[] {
  if (!existsSync(file)) return [];
  const directory = temporaryDirectory();
  for (const suffix of ["", "-wal", "-shm"]) {
    if (existsSync(file + suffix)) cpSync(file + suffix, join(directory, `copy${suffix}`));
  }
  const database = new Database(join(directory, "copy"));
  try {
    const all = database.query("SELECT * FROM signing_keys ORDER BY signs_from").all();
    return all.map((row) => JSON.stringify(row));
  } catch {
    return [];
  } finally {
    database.close();
  }
}

// --- SIGTERM -------------------------------------------------------------------------------------

async function stops(): Promise<void> {
  const problems: string[] = [];
  let [answered, unread] = [0, 0];
  const rounds = 10;
  for (let round = 0; round < rounds; round++) {
    const resource = lastingOrigin();
    const idp = await startIdp({ resource, origin: lastingOrigin() });
    const api = await startApi(idp.origin, {}, resource);
    const token = accessTokenIn(await once(idp.origin, tokenRequest()));
    await once(api.origin, callRequest(token));
    const servers: [Started, () => string][] = [
      [idp, () => tokenRequest()],
      [api, () => callRequest(token)],
    ];
    const loads = servers.map(([{ origin }, make]) =>
      Promise.all(
        repeat(16, async () => {
          let got = 0;
          for (;;) {
            const connection = await Connection.open(origin).catch(() => undefined);
            if (!connection) return got; // nobody listens any more
            for (let isNew = true; ; isNew = false) {
              const { status, headers } = await connection.send(make());
              got += status === 200 ? 1 : 0;
              // A connection made while the server stops may end before it was read from.
              if (status === 0 && isNew) unread += 1;
              else if (status !== 200) problems.push(`status ${status} on a kept-alive connection`);
              if (status !== 200 || headers.get("connection") === "close") break;
              if (random.once(4)) await Bun.sleep(random.below(50));
            }
            connection.close();
          }
        }),
      ),
    );
    await Bun.sleep(100 + random.below(200));
    const codes = await Promise.all(servers.map(([{ program }]) => program.stop("SIGTERM")));
    const [tokens = 0, calls = 0] = (await Promise.all(loads)).map((got) =>
      got.reduce((sum, count) => sum + count),
    );
    answered += tokens + calls;
    scan(true);
    const said = (issued.get(idp.program) ?? 0) - 1; // one came before
    if (said !== tokens) problems.push(`${said} tokens issued, ${tokens} received`);
    if (codes.join() !== "0,0") problems.push(`exit codes ${codes.join()}`);
  }
  report(
    "SIGTERM: every request that was accepted is answered",
    `both servers, 16 kept-alive connections each, ${rounds} times`,
    answered,
    `all 200, as many tokens received as issued, exit code 0; ${unread} new connections not read`,
    [...new Set(problems)],
  );
}

// --- The disk is full ----------------------------------------------------------------------------

async function disk(): Promise<void> {
  const promise = "The disk is full: secrets work, proofs get 503, no key is lost, it heals";
  if (!Bun.spawnSync(["unshare", "--mount", "true"]).success) {
    return report(promise, "SKIPPED: needs the right to mount", 0, "not tried", []);
  }
  const cwd = temporaryDirectory();
  mkdirSync(join(cwd, "keys"));
  const origin = freeOrigin();
  const changes = { authorizationServer: { ...hostileClients("http://127.0.0.1:9") } };
  changes.authorizationServer.signingKeys = {
    ...authorizationServer.signingKeys,
    pollSeconds: 0.5,
  };
  const script = `mount -t tmpfs -o size=400k none keys && exec "$@"`;
  const preload = ["--preload", join(root, "test/configure.ts")];
  const command = ["unshare", "--mount", "sh", "-c", script, "sh", process.execPath, ...preload];
  const env = { PATH: process.env["PATH"], ISSUER: origin, API_URL: "http://127.0.0.1:9" };
  const program = new Program([...command, join(root, "idp.ts")], {
    cwd,
    env: { ...env, CONFIGURATION: JSON.stringify(changes) },
  });
  watch(program);
  await program.printed(/server/);
  const server = { program, origin, cwd };
  const problems: string[] = [];
  const inside = (path: string) => `/proc/${program.process.pid}/root${join(cwd, path)}`;
  const withProof = () =>
    tokenRequest("secret", `DPoP: ${encode(proofFor("POST", `${origin}/connect/token`))}`);
  const keysBefore = keyRows(inside("keys/keys.db"));
  const statuses: number[] = [];
  const connection = await Connection.open(origin);
  let usedOnce = "";
  for (let full = 0; full < 200 && statuses.length < 20_000;) {
    const request = withProof();
    const { status } = await connection.send(request);
    if (status === 200) usedOnce = request;
    else full += 1;
    statuses.push(status);
  }
  const wrong = statuses.filter((status) => status !== 200 && status !== 503);
  if (wrong.length) problems.push(histogram(wrong));
  if (!statuses.includes(503)) problems.push("the disk was never full");
  const plain = await Promise.all(repeat(100, () => once(origin, tokenRequest())));
  if (plain.some(({ status }) => status !== 200)) problems.push("a secret did not work");
  const enter = ["nsenter", "--mount", `--target=${program.process.pid}`, "mount"];
  Bun.spawnSync([...enter, "-o", "remount,size=20m", join(cwd, "keys")]);
  const heals = async () => (await connection.send(withProof())).status === 200;
  await eventually("heals", heals, 10).catch(() => problems.push("does not heal"));
  const replay = await connection.send(usedOnce);
  if (replay.status !== 400) problems.push(`a used proof: ${replay.status}`);
  const keysAfter = keyRows(inside("keys/keys.db"));
  if (!Bun.deepEquals(keysBefore, keysAfter)) problems.push("the keys are others");
  if (keysBefore.length !== 2) problems.push(`${keysBefore.length} keys`);
  connection.close();
  report(
    promise,
    "a disk of 400 kB filled with used proofs, then made larger",
    statuses.length,
    histogram(statuses),
    [...problems, ...gone(server)],
  );
  await end(server);
}

// --- The clock steps -----------------------------------------------------------------------------

/** Preloaded by a server: its clock differs by the seconds that are in a file. */
const steppingClock = `
  import { readFileSync } from "node:fs";
  const Real = Date;
  let offset = 0;
  const read = () => (offset = 1000 * Number(readFileSync(process.env.CLOCK, "utf8") || offset / 1000));
  read();
  setInterval(read, 5).unref();
  globalThis.Date = class extends Real {
    constructor(...given) { given.length ? super(...given) : super(Real.now() + offset); }
    static now() { return Real.now() + offset; }
  };`;

async function clock(): Promise<void> {
  const directory = temporaryDirectory();
  const preload = join(directory, "clock.ts");
  writeFileSync(preload, steppingClock);
  const clocks = ["idp", "api"].map((name) => join(directory, name));
  const step = (which: number, seconds: number) => writeFileSync(clocks[which]!, `${seconds}`);
  step(0, 0);
  step(1, 0);
  const env = (which: number) => ({ BUN_OPTIONS: `--preload ${preload}`, CLOCK: clocks[which]! });
  const resource = freeOrigin();
  const signingKeys = { ...fastKeys, rotationSeconds: 20, pollSeconds: 0.2 };
  const clients = hostileClients(resource).clients!.map((client) => ({
    ...client,
    access_token_lifetime_seconds: 20,
  }));
  const idp = await startIdp({ resource, env: env(0), changes: { signingKeys, clients } });
  const api = await startApi(
    idp.origin,
    { refreshSeconds: 0.5, coolDownSeconds: 0.1 },
    resource,
    env(1),
  );
  const problems: string[] = [];
  const rowsSeen = new Map<string, string>();
  const usedProofs: string[] = [];
  let requests = 0;
  let [accepted, refused] = [0, 0];
  const rounds = 40;
  for (let round = 0; round < rounds; round++) {
    const offsets = [random.below(121) - 60, random.below(121) - 60] as const;
    offsets.forEach((seconds, which) => step(which, seconds));
    await Bun.sleep(300); // longer than the poll: the keys are read, made and swept in this time
    const answer = await once(idp.origin, tokenRequest());
    requests += 1;
    if (answer.status !== 200) problems.push(`a token request: ${answer.status}`);
    else {
      const token = accessTokenIn(answer);
      const { exp = 0, nbf = 0 } = jose.decodeJwt(token);
      const { status } = await once(api.origin, callRequest(token));
      const now = secondsNow() + offsets[1];
      requests += 1;
      if (status === 200) accepted += 1;
      else refused += 1;
      // Two seconds either way are left open: the clocks go on meanwhile.
      if (status === 200 && now > exp + 32) problems.push(`accepted ${now - exp} s past exp`);
      if (status === 200 && now < nbf - 32) problems.push(`accepted ${nbf - now} s before nbf`);
      const isGood = now > nbf - 28 && now < exp + 28;
      if (isGood && status !== 200) problems.push(`a good token: ${status}`);
      if (status >= 500) problems.push(`status ${status}`);
    }
    const proof = proofFor("POST", `${idp.origin}/connect/token`);
    proof.claims["iat"] = secondsNow() + offsets[0];
    const withProof = tokenRequest("secret", `DPoP: ${encode(proof)}`);
    const used = await once(idp.origin, withProof);
    if (used.status !== 200) problems.push(`a proof: ${used.status} ${used.body}`);
    usedProofs.push(withProof);
    for (const request of usedProofs) {
      const { status } = await once(idp.origin, request);
      requests += 1;
      if (status !== 400) problems.push(`a used proof, sent again: ${status}`);
    }
    for (const row of keyRows(join(idp.cwd, "keys/keys.db"))) {
      const { kid } = JSON.parse(row) as { kid: string };
      if ((rowsSeen.get(kid) ?? row) !== row) problems.push("a key was dated anew");
      rowsSeen.set(kid, row);
    }
  }
  const last = keyRows(join(idp.cwd, "keys/keys.db")).map((row) => JSON.parse(row).kid as string);
  const lost = [...rowsSeen.keys()].filter((kid) => !last.includes(kid));
  if (lost.length) problems.push(`${lost.length} keys lost`);
  report(
    "The clock steps: no key lost or dated anew, no token past exp, no used jti forgotten",
    `both servers' clocks step by up to a minute either way, ${rounds} times`,
    requests,
    `${accepted} tokens accepted, ${refused} refused while the clocks differed; ${rowsSeen.size} keys, all kept`,
    [...new Set(problems), ...gone(idp), ...gone(api)],
  );
  await end(idp, api);
}

// --- Bounds --------------------------------------------------------------------------------------

async function bounds(): Promise<void> {
  const signer = pair("signer");
  const issuer = new FakeIssuer(signer);
  const api = await startApi(issuer.origin, { coolDownSeconds: 0.5 });
  const at = { issuer: issuer.origin, resource: api.origin, signer };
  await once(api.origin, callRequest(encode(tokenFor(at, "client"))));
  await rememberedTokens(api, at);
  await unknownKids(api, at, issuer);
  await headerFloods(api);
  await end(api);
  await proofs(issuer, signer);
  await issuer.stop();
}

type At = Parameters<typeof tokenFor>[0];

async function rememberedTokens(api: Started, at: At): Promise<void> {
  const padding = "x".repeat(2_700); // with it, tokens of almost 4 kB
  const half = 20_000;
  const use = async () => {
    const each = repeat(8, async () => {
      const connection = await Connection.open(api.origin);
      const wrong: number[] = [];
      for (let i = 0; i < half / 8; i++) {
        const token = tokenFor(at, "client");
        Object.assign(token.claims, { padding });
        const { status } = await connection.send(callRequest(encode(token)));
        if (status !== 200) wrong.push(status);
      }
      connection.close();
      return wrong;
    });
    return (await Promise.all(each)).flat();
  };
  const wrong = await use();
  const before = megabytes(api);
  wrong.push(...(await use()));
  const grown = megabytes(api) - before;
  report(
    "Remembered tokens are bounded",
    "tokens of 4 kB, each another",
    2 * half,
    `all 200; the latter half: memory ${signed(grown)} MB`,
    [
      ...wrong.map((status) => `status ${status}`),
      ...(grown > 40 ? [`memory grew by ${grown} MB`] : []),
    ],
  );
}

async function unknownKids(api: Started, at: At, issuer: FakeIssuer): Promise<void> {
  const [fetches, started, count] = [issuer.fetches, performance.now(), 20_000];
  const answers = await Promise.all(
    repeat(8, async () => {
      const connection = await Connection.open(api.origin);
      const statuses: number[] = [];
      for (let i = 0; i < count / 8; i++) {
        const token = tokenFor(at, "client");
        token.header["kid"] = random.word();
        statuses.push((await connection.send(callRequest(encode(token)))).status);
      }
      connection.close();
      return statuses;
    }),
  );
  const seconds = (performance.now() - started) / 1000;
  const fetched = (issuer.fetches - fetches) / 2; // metadata and set
  const most = seconds / 0.5 + 2;
  const problems = fetched > most ? [`${fetched} fetches in ${seconds} s`] : [];
  if (answers.flat().some((status) => status !== 401)) problems.push(histogram(answers.flat()));
  report(
    "Unknown kids fetch the keys once per cool-down",
    "random kids, cool-down 0.5 s",
    count,
    `${histogram(answers.flat())}; ${fetched} fetches in ${seconds.toFixed(1)} s`,
    problems,
  );
}

async function headerFloods(api: Started): Promise<void> {
  const before = megabytes(api);
  const floods = [
    `GET /identity HTTP/1.1\r\nHost: x\r\n${"X: y\r\n".repeat(5_000)}\r\n`,
    `GET /identity HTTP/1.1\r\nHost: x\r\nX: ${"a".repeat(1 << 20)}\r\n\r\n`,
    `GET /${"a".repeat(1 << 20)} HTTP/1.1\r\nHost: x\r\n\r\n`,
    `GET /identity HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${"a.".repeat(10_000)}\r\n\r\n`,
  ];
  const answers: number[] = [];
  for (let i = 0; i < 500; i++) {
    const four = await Promise.all(floods.map((flood) => once(api.origin, flood)));
    answers.push(...four.map(({ status }) => status));
  }
  const grown = megabytes(api) - before;
  const wrong = answers.filter((status) => status === -1 || status === 200 || status >= 500);
  report(
    "Header floods are refused",
    "heads of 30 kB to 1 MB",
    answers.length,
    `${histogram(answers)}; memory ${signed(grown)} MB`,
    [
      ...(wrong.length ? [histogram(wrong)] : []),
      ...(grown > 40 ? [`memory grew by ${grown} MB`] : []),
      ...gone(api),
    ],
  );
}

/** 50,000 used proofs are known, the oldest forgotten first. */
async function proofs(issuer: FakeIssuer, signer: ReturnType<typeof pair>): Promise<void> {
  const api = await startApi(issuer.origin);
  const at = { issuer: issuer.origin, resource: api.origin, signer };
  const token = tokenFor(at, "client");
  token.claims["cnf"] = { jkt: proofThumbprint };
  const accessToken = encode(token);
  const calling = () => {
    const proof = proofFor("GET", `${api.origin}/identity`, accessToken);
    return callRequest(accessToken, "DPoP", `DPoP: ${encode(proof)}`);
  };
  const problems: string[] = [];
  const first = calling();
  const expectStatus = async (what: string, request: string, wanted: number) => {
    const { status } = await once(api.origin, request);
    if (status !== wanted) problems.push(`${what}: ${status}`);
  };
  const started = performance.now();
  await expectStatus("the first proof", first, 200);
  const latest: string[] = [];
  const use = async (count: number) => {
    const each = repeat(8, async (which) => {
      const connection = await Connection.open(api.origin);
      for (let i = which; i < count; i += 8) {
        const request = calling();
        const { status } = await connection.send(request);
        if (status !== 200) problems.push(`a new proof: ${status}`);
        if (i % 500 === 0) latest.push(request);
      }
      connection.close();
    });
    await Promise.all(each);
  };
  await use(20_000);
  const before = megabytes(api);
  await use(29_999);
  await expectStatus("the first proof after 49,999 others", first, 401);
  for (const request of latest) await expectStatus("a used proof", request, 401);
  await use(1);
  const seconds = (performance.now() - started) / 1000;
  const forgotten = (await once(api.origin, first)).status;
  // Older than 90 s, it is refused for its age.
  if (seconds < 85 && forgotten !== 200) problems.push(`more than 50,000 known: ${forgotten}`);
  await use(20_000);
  const grown = megabytes(api) - before;
  if (grown > 40) problems.push(`memory grew by ${grown} MB`);
  report(
    "Used proofs are bounded, and 50,000 are known",
    "calls with a proof each",
    70_001,
    `a replay is refused until 50,000 others came; memory ${signed(grown)} MB`,
    [...new Set(problems), ...gone(api)],
  );
  await end(api);
}

// --- Secrets -------------------------------------------------------------------------------------

/** The client in every way, on both servers: what it says is watched as everything else is. */
async function secrets(): Promise<void> {
  const cwd = temporaryDirectory();
  const resource = freeOrigin();
  const maker = launch("client", { cwd, arguments: ["--new-key"] });
  await maker.ended();
  const jwk = JSON.parse(maker.stdout);
  const clients = [
    ...hostileClients(resource).clients!,
    { ...hostileClients(resource).clients![0]!, client_id: "keyed", jwks: { keys: [jwk] } },
  ];
  const idp = await startIdp({ resource, changes: { clients } });
  const api = await startApi(idp.origin, {}, resource);
  const base = { ISSUER: idp.origin, API_URL: resource };
  const withKey = { CLIENT_ID: "keyed", CLIENT_KEY: "keys/client.jwk" };
  const file = readFileSync(join(cwd, "keys/client.jwk"), "utf8");
  confidential.push(JSON.parse(file).d, "an even longer secret of somebody");
  const runs: [Record<string, string>, number][] = [
    [{}, 0],
    [{ DPOP: "1" }, 0],
    [withKey, 0],
    [{ ...withKey, DPOP: "1" }, 0],
    [{ CLIENT_SECRET: "an even longer secret of somebody" }, 1],
    [{ CLIENT_ID: "bound", CLIENT_SECRET: "a secret of the bound client" }, 1],
    [{ SCOPE: "read" }, 1],
    [{ CLIENT_KEY: "keys/nothing.jwk" }, 1],
    [{ API_URL: "http://127.0.0.1:9" }, 1],
    [{ ISSUER: "http://127.0.0.1:9" }, 1],
  ];
  const problems: string[] = [];
  for (const [env, code] of runs) {
    const client = watch(launch("client", { cwd, env: { ...base, ...env } }), ["stderr"]);
    const ended = await client.ended();
    if (ended !== code)
      problems.push(`${JSON.stringify(env)}: exit code ${ended}: ${client.stderr}`);
    scan();
  }
  await end(idp, api);
  report(
    "The client says what went wrong, and no secret",
    "ten ways of running it",
    runs.length,
    "each exit code as it should be",
    problems,
  );
}

// --- Run -----------------------------------------------------------------------------------------

const parts: Record<string, () => Promise<void>> = {
  ...{ input, sockets, load, guesses, issuer: issuerFaults },
  ...{ kill: kills, stop: stops, disk, clock, bounds, secrets },
};

const unknown = wanted.filter((name) => !parts[name]);
if (unknown.length) {
  console.error(`error: no part ${unknown.join()}; there are: ${Object.keys(parts).join(" ")}`);
  process.exit(1);
}
console.error(`seed ${seed}   (again: bun run soak ${wanted.join(" ")} --seed=${seed})`);
const started = performance.now();
for (const [name, part] of Object.entries(parts)) {
  if (wanted.length && !wanted.includes(name)) continue;
  console.error(`--- ${name} (${Math.round((performance.now() - started) / 1000)} s)`);
  try {
    await part();
  } catch (error) {
    report(`${name} runs to its end`, "", 0, "", [`${(error as Error).stack}`]);
  }
}
clearInterval(scanning);
scan(true);
const bytes = `${(scanned / 1e6).toFixed(1)} MB of output read, nothing found`;
report(
  "No secret, token, assertion, proof or private key in any output",
  "all programs of all parts",
  watchedCount,
  bytes,
  [...new Set(leaks.map((leak) => `found: ${leak.slice(0, 8)}…`))],
);
await cleanUp();
printTable();
console.log(`\nseed ${seed}, ${Math.round((performance.now() - started) / 1000)} s`);
process.exit(rows.some(({ problems }) => problems.length) ? 1 : 0);
