/**
 * Tries to break the programs, as processes of their own, in rounds until the time is over. Kills
 * and full disks are in operation/instances.test.ts.
 *
 *   bun run soak 600             for ten minutes; without a number for two
 *   SEED=7 bun run soak 600      the same input again
 *
 * Exit code 1 if a promise was broken. Linux alone: it reads /proc.
 */
import { readFileSync } from "node:fs";
import { eventually } from "../support/databases.ts";
import { Issuer } from "../support/jwt.ts";
import { launchWith, type Program, urlOf } from "../support/programs.ts";
import * as hostile from "./hostile.ts";
import { Connection, repeat, tokenRequest } from "./hostile.ts";

const seconds = Number(process.argv[2] ?? 120);
const firstSeed = Number(process.env["SEED"] ?? Math.floor(Math.random() * 1_000_000));
const signer = hostile.signerNamed("signer");
const issuer = new Issuer([]);
issuer.jwks = { keys: [signer.publicJwk] };
const otherApi = "https://api.example";

/** What broke a promise. */
const problems = new Set<string>();

/** How often each status came. One that is not allowed is a problem. */
function check(what: string, statuses: number[], ...allowed: number[]): void {
  const counts = [...Map.groupBy(statuses, (status) => status)];
  console.log(`${what}: ${counts.map(([status, all]) => `${all.length} × ${status}`).join(", ")}`);
  for (const [status] of counts)
    if (!allowed.includes(status)) problems.add(`${what}: status ${status}`);
}

// --- Programs and load ---------------------------------------------------------------------------

type Server = { program: Program; url: string };

async function startIdp(): Promise<Server> {
  const settings = { issuer: "http://127.0.0.1:0", ...hostile.hostileClients(otherApi) };
  const program = launchWith("idp", { authorizationServer: settings });
  return { program, url: await urlOf(program) };
}

async function startApi(): Promise<Server> {
  const times = { refreshSeconds: 0.2, coolDownSeconds: 0.1 };
  const settings = { issuer: issuer.url, resource: "http://127.0.0.1:0", ...times };
  const program = launchWith("api", { resourceServer: settings });
  return { program, url: await urlOf(program) };
}

/** Ends a program that must still run, and whose output must hold no secret. */
async function end({ program }: Server): Promise<void> {
  if (program.process.exitCode !== null) problems.add(`it ended by itself: ${program.stderr}`);
  await program.stop("SIGKILL");
  for (const leak of hostile.leaksIn(program.stdout + program.stderr))
    problems.add(`leak: ${leak}`);
  if (program.log.some(({ event }) => event === "failure")) problems.add("an unexpected failure");
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
  if (grown > most) problems.add(`memory grew by more than ${most} MB`);
}

/** Sends requests until there are no more, each connection one at a time. The statuses of all. */
async function load(url: string, connections: number, make: () => string | undefined) {
  const statuses: number[] = [];
  const worker = async () => {
    const connection = new Connection(url);
    for (let request = make(); request !== undefined; request = make())
      statuses.push((await connection.send(request)).status);
    connection.close();
  };
  await Promise.all(repeat(connections, worker));
  return statuses;
}

const times = (count: number, make: () => string) => () => (count-- > 0 ? make() : undefined);

// --- Parts ---------------------------------------------------------------------------------------

/** Bent requests: no 5xx, nothing reflected, no undue 200, and after a while no more memory. */
async function input(seed: number): Promise<void> {
  const [idp, api] = [await startIdp(), await startApi()];
  const attack = async (at: hostile.Target, which: number) => {
    const tally = await hostile.attack(at, which, 2_000);
    for (const problem of tally.problems) problems.add(problem);
    console.log(`bent: ${tally.accepted} of ${tally.sent} taken, ${tally.refusals.size} refusals`);
  };
  const idpAt = { issuer: idp.url, resource: otherApi };
  const apiAt = { issuer: issuer.url, resource: api.url, signer };
  await Promise.all([attack(idpAt, seed), attack(apiAt, seed)]);
  await within(60, idp, () => attack(idpAt, ~seed));
  await within(60, api, () => attack(apiAt, ~seed));
  await Promise.all([end(idp), end(api)]);
}

/** A thousand connections are left alone: others are served, and they are given up at last. */
async function idle(): Promise<void> {
  const idp = await startIdp();
  const connections = repeat(1_000, () => new Connection(idp.url));
  for (const [index, connection] of connections.entries())
    connection.write(tokenRequest().slice(0, (index % 5) * 40));
  check("beside idle ones", await load(idp.url, 8, times(2_000, tokenRequest)), 200);
  const areClosed = () => connections.every(({ isClosed }) => isClosed);
  const waiting = seconds < 100 ? undefined : eventually("idle ones are closed", areClosed, 100);
  await waiting?.catch((error: Error) => problems.add(error.message));
  await end(idp);
}

console.log(`SEED=${firstSeed}`);
const beside = idle();
for (let seed = firstSeed; performance.now() < seconds * 1000; seed++) await input(seed);
await beside;
for (const problem of problems) console.log(`BROKEN: ${problem.slice(0, 2_000)}`);
if (problems.size === 0) console.log("Every promise was kept.");
process.exit(problems.size === 0 ? 0 : 1);
