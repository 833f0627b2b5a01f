/**
 * Tries for about two minutes to break the programs, as processes of their own. The parts are at
 * the end.
 *
 * Run: bun run test/attack/soak.ts [part …]   (SEED=… sends the same requests again)
 * Exit code 1 if a promise was broken. Linux alone: it reads /proc and mounts a disk of its own.
 */

import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { Issuer } from "../support/jwt.ts";
import { launchWith, type Program, temporaryDirectory, urlOf } from "../support/programs.ts";
import * as hostile from "./hostile.ts";
import { Connection, encode, once, repeat, tokenFor, tokenRequest } from "./hostile.ts";

const seed = Number(process.env["SEED"] ?? Math.floor(Math.random() * 1_000_000));
const chance = new hostile.Chance(seed);
const signer = await hostile.signerNamed("signer");
const issuer = new Issuer([signer]);
const otherApi = "https://api.example";
/** What broke a promise. */
const problems: string[] = [];

/** How often each status came. One that is not allowed is a problem. */
function check(what: string, statuses: number[], ...allowed: number[]): void {
  const counts = [...Map.groupBy(statuses, (status) => status)];
  console.log(`${what}: ${counts.map(([status, all]) => `${all.length} × ${status}`).join(", ")}`);
  for (const status of new Set(statuses))
    if (!allowed.includes(status)) problems.push(`${what}: status ${status}`);
}

// --- Programs and load ---------------------------------------------------------------------------

type Server = { program: Program; url: string };

async function startIdp(changes = {}, cwd = temporaryDirectory()): Promise<Server> {
  const clients = hostile.hostileClients(otherApi);
  const settings = { issuer: "http://127.0.0.1:0", ...clients, ...changes };
  const program = launchWith("idp", { authorizationServer: settings }, { cwd });
  return { program, url: await urlOf(program) };
}

async function startApi(changes = {}): Promise<Server> {
  const times = { refreshSeconds: 0.2, coolDownSeconds: 0.1 };
  const settings = { issuer: issuer.url, resource: "http://127.0.0.1:0", ...times, ...changes };
  const program = launchWith("api", { resourceServer: settings });
  return { program, url: await urlOf(program) };
}

/** Ends a program that must still run, and whose output must hold no secret. */
async function end({ program }: Server, signal: NodeJS.Signals = "SIGKILL"): Promise<number> {
  if (program.process.exitCode !== null) problems.push(`it ended by itself: ${program.stderr}`);
  const code = await program.stop(signal);
  problems.push(...hostile.leaksIn(program.stdout + program.stderr).map((leak) => `leak: ${leak}`));
  return code;
}

/** Runs an attack that must not cost more than so many megabytes of memory. */
async function within(most: number, { program }: Server, attack: () => Promise<unknown>) {
  const read = (name: string) => {
    const status = readFileSync(`/proc/${program.process.pid}/status`, "utf8");
    return Number(new RegExp(`${name}:\\s+(\\d+)`).exec(status)?.[1]) / 1024;
  };
  const before = read("VmRSS");
  await attack();
  const grown = Math.round(read("VmHWM") - before);
  console.log(`  memory: ${grown} MB more at most`);
  if (grown > most) problems.push(`memory grew by ${grown} MB`);
}

/** Sends requests until there are no more, each connection one at a time. The statuses of all. */
async function load(url: string, connections: number, make: () => string | undefined) {
  const statuses: number[] = [];
  const worker = async () => {
    const connection = await Connection.open(url);
    for (let request = make(); request !== undefined; request = make())
      statuses.push((await connection.send(request)).status);
    connection.close();
  };
  await Promise.all(repeat(connections, worker));
  return statuses;
}

const times = (count: number, make: () => string) => () => (count-- > 0 ? make() : undefined);

const jwksOf = async (url: string) =>
  await (await fetch(`${url}/.well-known/openid-configuration/jwks`)).text();

async function eventually(what: string, seconds: number, condition: () => Promise<boolean>) {
  const deadline = Date.now() + seconds * 1000;
  while (Date.now() < deadline) {
    if (await condition()) return;
    await Bun.sleep(50);
  }
  problems.push(`not within ${seconds} s: ${what}`);
}

// --- Parts ---------------------------------------------------------------------------------------

/** Bent requests: no 5xx, nothing reflected, no undue 200, and after a while no more memory. */
async function input(): Promise<void> {
  const [idp, api] = [await startIdp(), await startApi()];
  const attack = async (at: hostile.Target, which: number) => {
    const tally = await hostile.attack(at, which, 8_000);
    problems.push(...tally.problems);
    console.log(`bent: ${tally.accepted} of ${tally.sent} taken, ${tally.refusals.size} refusals`);
  };
  const idpAt = { issuer: idp.url, resource: otherApi };
  const apiAt = { issuer: issuer.url, resource: api.url, signer };
  await Promise.all([attack(idpAt, seed), attack(apiAt, seed)]);
  await within(40, idp, () => attack(idpAt, seed + 1));
  await within(40, api, () => attack(apiAt, seed + 1));
  await Promise.all([end(idp), end(api)]);
}

/** One client floods with proofs; the captured proof of another must stay refused. */
async function proofs(): Promise<void> {
  const api = await startApi();
  const tokenOf = (client_id: string) =>
    encode(tokenFor({ issuer: issuer.url, resource: api.url, signer }, client_id, true));
  const flooding = tokenOf("flooder");
  const captured = hostile.provenCallRequest(api.url, tokenOf("victim"));
  check("a proof", [(await once(api.url, captured)).status], 200);
  const flood = times(50_050, () => hostile.provenCallRequest(api.url, flooding));
  const started = Date.now();
  await within(120, api, async () =>
    check("a flood of proofs", await load(api.url, 16, flood), 200),
  );
  check("the captured proof", [(await once(api.url, captured)).status], 401);
  if (Date.now() - started > 85_000) problems.push("too slow: the proof has expired meanwhile");
  await end(api);
}

/** A new key each second, and kill -9 at random instants: no key is lost, no proof forgotten. */
async function kills(): Promise<void> {
  // The system gives such a port to no outgoing connection, so the server can come back there.
  const url = `http://127.0.0.1:${20_000 + chance.below(10_000)}`;
  const cwd = temporaryDirectory();
  const short = { pollSeconds: 0.1, maxAgeSeconds: 0.1, refreshSeconds: 0.1, coolDownSeconds: 0.1 };
  const signingKeys = { ...authorizationServer.signingKeys, rotationSeconds: 1, ...short };
  const [tokens, statuses]: [string[], number[]] = [[], []];
  const start = () => startIdp({ issuer: url, signingKeys }, cwd);
  let used = "";
  for (let round = 0; round < 20; round++) {
    const idp = await start();
    if (used) check("a used proof after kill -9", [(await once(url, used)).status], 400);
    let isOver = false;
    const worker = async (which: number) => {
      while (!isOver) {
        const request = which % 2 ? tokenRequest() : hostile.provenTokenRequest(url);
        const { status, body } = await once(url, request);
        statuses.push(status);
        if (status === 200 && which % 2) tokens.push(JSON.parse(body).access_token);
        else if (status === 200) used = request;
      }
    };
    const working = Promise.all(repeat(8, worker));
    await Bun.sleep(chance.below(500));
    await end(idp);
    isOver = true;
    await working;
  }
  check("kill -9 under load", statuses, 200, 0);
  const idp = await start();
  const published = await jwksOf(url);
  const lost = tokens.filter(
    (token) => !published.includes(jose.decodeProtectedHeader(token).kid!),
  );
  if (lost.length > 0) problems.push(`${lost.length} tokens of keys that are gone`);
  await end(idp);
}

/** SIGTERM while kept-alive connections are busy: what was accepted is answered. */
async function stops(): Promise<void> {
  for (let round = 0; round < 5; round++) {
    const idp = await startIdp();
    const statuses: number[] = [];
    const worker = async () => {
      while (true) {
        const connection = await Connection.open(idp.url).catch(() => undefined);
        if (!connection) return;
        for (let isNew = true; !connection.isClosed; isNew = false) {
          const { status, headers } = await connection.send(tokenRequest());
          // A connection that is made while the server stops may end before it is read.
          if (status !== 0 || !isNew) statuses.push(status);
          if (headers.get("connection") === "close") break;
        }
        connection.close();
      }
    };
    const working = Promise.all(repeat(16, worker));
    await Bun.sleep(200 + chance.below(200));
    if ((await end(idp, "SIGTERM")) !== 0) problems.push("SIGTERM: the exit code is not 0");
    await working;
    check("SIGTERM under load", statuses, 200);
    const issued = idp.program.log.filter(({ event }) => event === "token issued").length;
    if (issued !== statuses.length) problems.push(`SIGTERM: ${issued} issued`);
  }
}

/** Used proofs fill a small disk: secrets go on to work, and it heals with the disk. */
async function disk(): Promise<void> {
  const cwd = temporaryDirectory();
  const keys = join(cwd, "keys");
  const mount = (...options: string[]) => Bun.spawnSync(["mount", ...options, keys]);
  mkdirSync(keys);
  mount("-t", "tmpfs", "-o", "size=400k", "none");
  const signingKeys = { ...authorizationServer.signingKeys, pollSeconds: 0.5 };
  const { program, url } = await startIdp({ signingKeys }, cwd);
  const published = await jwksOf(url);
  const statuses: number[] = [];
  let used = "";
  const prove = async () => {
    const request = hostile.provenTokenRequest(url);
    const { status } = await once(url, request);
    if (status === 200) used = request;
    return status;
  };
  for (let refused = 0; refused < 100 && statuses.length < 10_000;) {
    const status = await prove();
    statuses.push(status);
    if (status === 503) refused++;
  }
  check("proofs until the disk is full", statuses, 200, 503);
  if (!statuses.includes(503)) problems.push("the disk was never full");
  check(
    "secrets, the disk full",
    await load(
      url,
      4,
      times(100, () => tokenRequest()),
    ),
    200,
  );
  mount("-o", "remount,size=20m");
  await eventually("it heals", 10, async () => (await prove()) === 200);
  check("a used proof", [(await once(url, used)).status], 400);
  if ((await jwksOf(url)) !== published) problems.push("the disk was full: the keys are others");
  await end({ program, url });
}

const nested = "[".repeat(500_000) + "]".repeat(500_000);
const spaces = Buffer.alloc(65_536, " ");
const bomb = Bun.gzipSync(" ".repeat(64 << 20));
/** How an issuer can answer instead of well. */
const faults: Record<string, () => Response | Promise<Response>> = {
  "500": () => new Response("no", { status: 500 }),
  "JSON nested deep": () => new Response(nested),
  "an endless body": () =>
    new Response(new ReadableStream({ pull: (stream) => stream.enqueue(spaces) })),
  "64 MiB, compressed": () => new Response(bomb, { headers: { "content-encoding": "gzip" } }),
  silence: () => new Promise(() => {}),
};

/** Good tokens are accepted all the while, unknown kids are not, and all is well afterwards. */
async function badIssuer(): Promise<void> {
  for (const [name, fault] of Object.entries(faults)) {
    const api = await startApi();
    const call = (kid?: string) => {
      const jwt = tokenFor({ issuer: issuer.url, resource: api.url, signer }, chance.word());
      if (kid) jwt.header["kid"] = kid;
      return hostile.callRequest(encode(jwt));
    };
    check("a call", [(await once(api.url, call())).status], 200);
    issuer.answer = fault;
    const deadline = Date.now() + (fault === faults["silence"] ? 6_000 : 1_000);
    const until = (make: () => string) => () => (Date.now() < deadline ? make() : undefined);
    await within(300, api, async () => {
      const good = load(
        api.url,
        8,
        until(() => call()),
      );
      const unknown = load(
        api.url,
        4,
        until(() => call("unknown")),
      );
      check(`an issuer that answers ${name}: good tokens`, await good, 200);
      check("  unknown kids", await unknown, 401, 503);
    });
    issuer.answer = undefined;
    const isWell = async () => (await once(api.url, call("unknown"))).status === 401;
    await eventually("the API is well again", 10, isWell);
    await end(api);
  }
}

/** A thousand connections are left alone: others are served, and they are given up at last. */
async function idle(): Promise<void> {
  const idp = await startIdp();
  const half = tokenRequest().slice(0, -5);
  const connections = await Promise.all(repeat(1_000, () => Connection.open(idp.url)));
  for (const [index, connection] of connections.entries())
    connection.write(half.slice(0, (index % 5) * 40));
  check(
    "beside 1,000 idle connections",
    await load(
      idp.url,
      8,
      times(2_000, () => tokenRequest()),
    ),
    200,
  );
  const areClosed = async () => connections.every(({ isClosed }) => isClosed);
  await eventually("all idle connections are closed", 100, areClosed);
  await end(idp);
}

const parts: Record<string, () => Promise<void>> = { input, proofs, kills, stops, disk, badIssuer };
const wanted = process.argv.length > 2 ? process.argv.slice(2) : ["idle", ...Object.keys(parts)];
// The disk of a part is mounted in a name space of its own, with which it goes.
const unshare = ["unshare", "--mount", "--map-root-user", process.execPath, "--no-orphans"];
if (process.env["INSIDE"] === undefined) {
  const env = { ...process.env, INSIDE: "yes", SEED: `${seed}` };
  const inside = Bun.spawnSync([...unshare, ...process.argv.slice(1)], {
    env,
    stdio: ["ignore", "inherit", "inherit"],
  });
  process.exit(inside.exitCode);
}
console.log(`seed ${seed}`);
const waiting = wanted.includes("idle") ? idle() : undefined;
for (const name of wanted) await parts[name]?.();
await waiting;
for (const problem of new Set(problems)) console.log(`BROKEN: ${problem.slice(0, 2_000)}`);
console.log(problems.length > 0 ? "" : "Every promise was kept.");
process.exit(problems.length > 0 ? 1 : 0);
