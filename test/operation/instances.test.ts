/** Several instances on one database, and what happens when they or the database go away. */

import { expect, setDefaultTimeout, test } from "bun:test";
import { Database } from "bun:sqlite";
import { mkdirSync } from "node:fs";
import { dirname } from "node:path";
import * as jose from "jose";
import { authorizationServer, type AuthorizationServerSettings } from "../../config.ts";
import { engines, eventually, execute, freePort, noPgBouncer } from "../support/databases.ts";
import { noServer, pgBouncer, postgresDatabase, PostgresServer } from "../support/databases.ts";
import { postgresUrl, sayingPostgres, schemaOf, succeeds } from "../support/databases.ts";
import type { Table } from "../support/databases.ts";
import { type Answer, basic, post, refusalOf, send } from "../support/http.ts";
import { assertion, assertionType, key, proof } from "../support/jwt.ts";
import { launchWith, type Program } from "../support/programs.ts";
import { api, idp, reservePort, resource } from "../support/servers.ts";

setDefaultTimeout(60_000);

// --- Instances and requests ----------------------------------------------------------------------

/** What all instances call themselves, wherever they listen. */
const issuer = "http://localhost:5001";
const robot = await key();
const grant = { grant_type: "client_credentials" };
const common = {
  issuer,
  clients: [{ ...authorizationServer.clients[0]!, jwks: { keys: [robot.publicJwk] } }],
  signingKeys: { ...authorizationServer.signingKeys, pollSeconds: 0.05 },
};
const rotation = common.signingKeys.rotationSeconds;
type Changes = Partial<AuthorizationServerSettings>;

/** An instance in this process, which ends with its table. */
async function instance({ url, users }: Table, changes: Changes = {}) {
  const where = { databaseUrl: url, listen: "127.0.0.1:0" };
  const running = await idp({ ...common, ...where, ...changes });
  users.push(running);
  return { url: `http://127.0.0.1:${running.server.port}`, lines: running.lines };
}

/** An instance in a process of its own, which can be asked at `url` once it has started. */
function launched(databaseUrl: string, changes: Changes = {}) {
  const { port, release } = reservePort();
  const where = { databaseUrl, listen: `127.0.0.1:${port}`, reusePort: true };
  const program = launchWith("idp", { authorizationServer: { ...common, ...where, ...changes } });
  const started = async () => {
    await program.printed(/started/);
    release();
  };
  return { url: `http://127.0.0.1:${port}`, program, started };
}

/** A token request with a secret, and with a proof if one is given. */
const token = (url: string, dpop?: string): Promise<Answer> => {
  const headers = { authorization: basic("client", "secret"), ...(dpop && { dpop }) };
  return post(`${url}/connect/token`, grant, headers);
};
const newProof = (signer = robot, jti: string = crypto.randomUUID()) =>
  proof(signer, "POST", `${issuer}/connect/token`, "", { jti });

/** A token request with an assertion. */
async function assert(url: string, jti: string = crypto.randomUUID()): Promise<Answer> {
  const client_assertion = await assertion(robot, "client", issuer, { jti });
  const credentials = { client_assertion, client_assertion_type: assertionType };
  return await post(`${url}/connect/token`, { ...grant, ...credentials });
}

const statusOf = async (answer: Promise<Answer>) => (await answer).status;
const health = async (url: string): Promise<string> => (await send(`${url}/health`)).json.status;
const becomes = (url: string, status: string) =>
  eventually(`${url} is ${status}`, async () => (await health(url)) === status);

async function publishes(url: string): Promise<string[]> {
  const { json } = await send(`${url}/.well-known/openid-configuration/jwks`);
  return json.keys.map(({ kid }: jose.JWK) => kid);
}

/** Makes the table as old as if all servers had been off for so long. */
const age = (table: Table, seconds: number) =>
  table.change(
    `UPDATE signing_keys SET signs_from = signs_from - ${seconds},
       signs_until = signs_until - ${seconds}, removed_at = removed_at - ${seconds}`,
  );

/** One line on stderr that says why a start failed, and exit code 1. */
async function failure(program: Program): Promise<string> {
  expect(await program.ended()).toBe(1);
  expect(program.stderr).toMatch(/^(Waiting [^\n]+\n)?error: [^\n]+\n$/);
  expect(program.stderr + program.stdout).not.toContain("hidden");
  return program.stderr;
}

const [onSqlite, onPostgres] = engines as [(typeof engines)[0], (typeof engines)[0]];

function scenario(on: typeof onSqlite, name: string, run: (table: Table) => Promise<void>): void {
  test.concurrent.skipIf(on.isMissing)(`instances, ${on.engine}: ${name}`, async () => {
    const table = await on.make();
    await run(table).finally(() => table.close());
  });
}

// --- Together ------------------------------------------------------------------------------------

const seed = Number(process.env["SEED"] ?? Date.now() % 1_000_000);
console.log(`SEED=${seed} repeats the moments at which instances are killed`);

/** The milliseconds before a kill, from before it opens the database until after it listens. */
const moment = (round: number) => 40 + (((seed + round) * 7_919) % 160);

for (const on of engines) {
  scenario(on, "five processes that start at one instant have the same two keys", async (table) => {
    const all = [1, 2, 3, 4, 5].map(() => launched(table.url));
    for (const { program } of all) table.users.push(program);
    await Promise.all(all.map(({ started }) => started()));
    const rows = await table.rows();
    expect(rows.map(({ generation }) => generation)).toEqual([1, 2]);
    expect(rows[1]!.signs_from).toBe(rows[0]!.signs_until);
    for (const { url } of all) {
      expect(await publishes(url)).toEqual(rows.map(({ kid }) => kid));
      const { access_token } = (await token(url)).json;
      expect(jose.decodeProtectedHeader(access_token).kid).toBe(rows[0]!.kid);
    }
    // One proof, sent to all of them at once, is used once; what is new is never refused.
    const dpop = await newProof();
    const replays = await Promise.all(all.map(({ url }) => statusOf(token(url, dpop))));
    expect(replays.toSorted()).toEqual([200, 400, 400, 400, 400]);
    const many = Array.from({ length: 20 }, (_, index) => statusOf(assert(all[index % 5]!.url)));
    expect(new Set(await Promise.all(many))).toEqual(new Set([200]));
  });

  scenario(on, "what is used at once, at one instance or two, is used once", async (table) => {
    const urls = [(await instance(table)).url, (await instance(table)).url] as const;
    const jtis = Array.from({ length: 8 }, () => crypto.randomUUID());
    const sent = jtis.map((jti) => [...urls, ...urls, ...urls].map((url) => assert(url, jti)));
    for (const answers of sent) {
      const statuses = (await Promise.all(answers)).map(({ status }) => status);
      expect(statuses.toSorted()).toEqual([200, 401, 401, 401, 401, 401]);
    }
    // Another key may use the same identifier, once.
    for (const signer of [robot, await key()]) {
      const dpop = await newProof(signer, jtis[0]);
      const statuses = [await statusOf(token(urls[0], dpop)), await statusOf(token(urls[1], dpop))];
      expect(statuses).toEqual([200, 400]);
    }
  });

  scenario(on, "kill -9 at a start, or while a key is made: the next goes on", async (table) => {
    for (let round = 0; round < 4; round++) {
      // The first time there is no database yet.
      if (round % 2) await age(table, rotation);
      else if (round) await table.change("DELETE FROM signing_keys");
      const before = round ? await table.rows() : [];
      const { program } = launched(table.url);
      await Bun.sleep(moment(round));
      await program.stop("SIGKILL");
      const { url } = await instance(table);
      const after = await table.rows();
      expect(after.slice(0, before.length)).toEqual(before);
      const [signing, next] = after.slice(-2);
      expect(next!.generation).toBe(signing!.generation + 1);
      expect(next!.signs_from).toBe(signing!.signs_until);
      expect((await publishes(url)).slice(-2)).toEqual([signing!.kid, next!.kid]);
      await table.users.pop()!.stop();
    }
  });

  scenario(on, "an API that fetched keys before a rotation knows the next one", async (table) => {
    let now = Date.now();
    const clock = () => now;
    const { url } = await instance(table, { issuer: "http://127.0.0.1:0", clock });
    const never = { refreshSeconds: 1_000_000, coolDownSeconds: 1_000_000 };
    const protectedApi = await api(url, { resource, listen: "127.0.0.1:0", clock, ...never });
    table.users.push(protectedApi);
    const kids = new Set();
    for (const seconds of [rotation - 9, 18]) {
      now += seconds * 1000;
      const { access_token } = (await token(url)).json;
      kids.add(jose.decodeProtectedHeader(access_token).kid);
      const headers = { authorization: `Bearer ${access_token}` };
      const address = `http://127.0.0.1:${protectedApi.server.port}/identity`;
      expect(await statusOf(send(address, { headers }))).toBe(200);
    }
    expect(kids.size).toBe(2);
  });
}

// --- SQLite --------------------------------------------------------------------------------------

/** Another program that keeps the file of a table locked, until it is closed. */
function locked({ file }: Table): { release: () => void } {
  mkdirSync(dirname(file), { recursive: true });
  const other = new Database(file, { create: true });
  other.run("PRAGMA busy_timeout = 10000"); // a server may be writing just now
  other.run("BEGIN EXCLUSIVE");
  return { release: () => other.close() };
}

scenario(onSqlite, "a lock delays a start and a first use, or refuses that", async (table) => {
  const first = locked(table);
  const { url, program, started } = launched(table.url);
  table.users.push(program);
  const files = () => Bun.spawnSync(["ls", "-l", `/proc/${program.process.pid}/fd`]).stdout;
  await eventually("it opens the file", () => `${files()}`.includes(table.file));
  await Bun.sleep(300); // longer than SQLite itself waits
  expect(program.stderr).toBe("");
  first.release();
  await started();
  expect(program.stderr).toMatch(/^started: [^\n]+\n$/);
  expect(await health(url)).toBe("ok");
  const second = locked(table);
  expect(refusalOf(await assert(url))).toBe("503 temporarily_unavailable");
  expect(await statusOf(token(url))).toBe(200);
  await becomes(url, "degraded");
  const late = assert(url);
  await Bun.sleep(700); // the server asks SQLite again for 2 s
  second.release();
  expect(await statusOf(late)).toBe(200);
  await becomes(url, "ok");
});

const noLimit = Bun.which("prlimit") ? "" : " (needs prlimit)";
const disk = { ...onSqlite, isMissing: noLimit !== "" };

scenario(disk, `a full disk: it signs, refuses assertions, heals${noLimit}`, async (table) => {
  const { url, program, started } = launched(table.url);
  table.users.push(program);
  await started();
  // No file may grow beyond one byte, or any size: so a write fails as it does on a full disk.
  const limit = (size: string) =>
    Bun.spawnSync(["prlimit", `--pid=${program.process.pid}`, `--fsize=${size}:`]);
  const count = (name: string) => program.log.filter(({ event }) => event === name).length;
  expect([await statusOf(assert(url)), await health(url)]).toEqual([200, "ok"]);
  limit("1");
  await becomes(url, "degraded");
  await eventually("three polls have failed", () => count("database away") > 3);
  expect([await statusOf(token(url)), await statusOf(assert(url))]).toEqual([200, 503]);
  expect([count("database back"), await health(url)]).toEqual([0, "degraded"]);
  limit("unlimited");
  await becomes(url, "ok");
  await eventually("the log says so, once", () => count("database back") === 1);
  expect([await statusOf(assert(url)), (await table.rows()).length]).toEqual([200, 2]);
});

// --- PostgreSQL: starts that fail or wait --------------------------------------------------------

const silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
const starting = sayingPostgres("57P03", "the database system is starting up");
const refusing = sayingPostgres("28P01", "password authentication failed");
const serverless = sayingPostgres("08P01", "server login has been failing");
const mayHeal = { "it starts (57P03)": starting, "PgBouncer alone (08P01)": serverless };
for (const listener of [silent, starting, refusing, serverless]) listener.unref();

/** Where the database would be, and how long a start waits for it. */
const away: [what: string, address: string, databaseWaitSeconds: number][] = [
  ["nobody listens", `127.0.0.1:${freePort()}`, 0.2],
  ["nobody listens at 5432, without a port in the URL", "127.0.0.2", 0],
  ["nobody answers", `127.0.0.1:${silent.port}`, 0.1],
  ["it starts itself (57P03)", `127.0.0.1:${starting.port}`, 0.2],
  ["it refuses the password (28P01)", `127.0.0.1:${refusing.port}`, 30],
];
for (const [what, address, databaseWaitSeconds] of away)
  test.concurrent(`instances, PostgreSQL: ${what} → it is named, exit code 1`, async () => {
    const url = `postgres://postgres:hidden@${address}/postgres`;
    const said = await failure(launched(url, { databaseWaitSeconds }).program);
    expect(said).toContain(address.includes(":") ? address : `${address}:5432`);
  });

for (const [what, { port }] of Object.entries(mayHeal))
  test.concurrent(`instances, PostgreSQL: ${what} → a start waits for it`, async () => {
    const { program } = launched(`postgres://postgres:hidden@127.0.0.1:${port}/postgres`);
    await program.printed(RegExp(`^Waiting for .+:${port}: `));
    expect(await program.stop("SIGTERM")).toBe(0);
  });

test.concurrent.skipIf(noServer !== "")(
  `instances, PostgreSQL${noServer}: late, frozen, stopped, back`,
  async () => {
    const server = await new PostgresServer().initialize();
    const { url, program, started } = launched(server.url);
    await program.printed(/Waiting/);
    await server.start();
    await started();
    expect(program.stderr).toMatch(/^Waiting [^\n]+\nstarted: [^\n]+\n$/);
    expect(program.stderr).toContain(`127.0.0.1:${server.port}`);
    const used = await newProof();
    expect([await statusOf(token(url, used)), await health(url)]).toEqual([200, "ok"]);
    const logs = (name: string) =>
      eventually(`"${name}" is logged`, () => program.log.some(({ event }) => event === name));
    const isAway = async () => {
      // What needs the database is refused, several at once too; secrets do not need it.
      const refused = [1, 2, 3].map(async () => refusalOf(await token(url, await newProof())));
      expect(await statusOf(token(url))).toBe(200);
      expect(new Set(await Promise.all(refused))).toEqual(new Set(["503 temporarily_unavailable"]));
      await becomes(url, "degraded");
      await logs("database away");
    };
    const isBack = async () => {
      await becomes(url, "ok");
      await logs("database back");
      expect(program.stderr + program.stdout).not.toContain("hidden");
      program.stdout = "";
      expect(await statusOf(token(url, await newProof()))).toBe(200);
    };
    server.freeze();
    await isAway();
    await server.thaw();
    await isBack();
    await server.stop();
    await isAway();
    await server.start();
    await isBack();
    // What was used before is still used.
    expect(refusalOf(await token(url, used))).toBe("400 invalid_dpop_proof");
    await program.stop();
    await server.stop();
  },
);

// --- PostgreSQL: roles, locks, a pool ------------------------------------------------------------

/** The URL by which a role of its own uses the tables that are there, and its name. */
async function roleFor(table: Table): Promise<{ roleUrl: string; role: string }> {
  const schema = schemaOf(table);
  const role = `role_${schema}`;
  await execute(
    postgresUrl!,
    `CREATE ROLE ${role} LOGIN PASSWORD 'hidden'`,
    `GRANT USAGE ON SCHEMA ${schema} TO ${role}`,
    `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ${schema} TO ${role}`,
  );
  const drop = [`DROP OWNED BY ${role}`, `DROP ROLE ${role}`];
  table.users.push({ stop: () => execute(postgresUrl!, ...drop) });
  const url = new URL(table.url);
  Object.assign(url, { username: role, password: "hidden" });
  return { roleUrl: url.href, role };
}

scenario(onPostgres, "a role without CREATE runs on the tables that are there", async (table) => {
  await instance(table);
  const rows = await table.rows();
  const { roleUrl: databaseUrl } = await roleFor(table);
  const { url } = await instance(table, { databaseUrl });
  expect(await publishes(url)).toEqual(rows.map(({ kid }) => kid));
  expect([await statusOf(assert(url)), await health(url)]).toEqual([200, "ok"]);
  await table.change("DROP TABLE signing_keys, used_jtis");
  const said = await failure(launched(databaseUrl).program);
  expect(said).toContain("permission denied");
});

scenario(onPostgres, "a database that can only be read signs, and heals", async (table) => {
  const { url: writing } = await instance(table);
  const { role, roleUrl: databaseUrl } = await roleFor(table);
  await execute(postgresUrl!, `ALTER ROLE ${role} SET default_transaction_read_only = on`);
  const { url } = await instance(table, { databaseUrl });
  expect([await statusOf(token(url)), await statusOf(assert(url))]).toEqual([200, 503]);
  expect([await health(url), await health(writing)]).toEqual(["degraded", "ok"]);
  expect(await publishes(url)).toEqual(await publishes(writing));
  // Its connections would stay as they are: it must make new ones.
  await execute(postgresUrl!, `ALTER ROLE ${role} RESET ALL`);
  await becomes(url, "ok");
  expect(await statusOf(assert(url))).toBe(200);
});

scenario(onPostgres, "a slow database: what is used once waits, or is refused", async (table) => {
  const { url } = await instance(table);
  await table.change("BEGIN; LOCK TABLE used_jtis");
  const waiting = assert(url);
  expect(await statusOf(token(url))).toBe(200);
  expect(Bun.peek.status(waiting)).toBe("pending");
  await table.change("COMMIT");
  expect(await statusOf(waiting)).toBe(200);
  await table.change("BEGIN; LOCK TABLE used_jtis");
  const refused = assert(url);
  expect([await statusOf(token(url)), await statusOf(refused)]).toEqual([200, 503]);
  expect(await health(url)).toBe("degraded");
  await table.change("COMMIT");
  await becomes(url, "ok");
  expect(await statusOf(assert(url))).toBe(200);
});

scenario(onPostgres, "another makes a table just now: a start tries again", async (table) => {
  const columns = "id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL";
  await table.change(`BEGIN; CREATE TABLE used_jtis (${columns})`);
  const running = instance(table);
  // Asked from elsewhere, for within a transaction the answer stays the same.
  const waits = `SELECT 1 / count(*) FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND application_name = '${schemaOf(table)}'`;
  await eventually("it waits", () => succeeds(postgresUrl!, waits));
  await table.change("COMMIT");
  expect(await health((await running).url)).toBe("ok");
});

scenario(onPostgres, "a database that is not there → named at once", async (table) => {
  const url = new URL(table.url);
  url.pathname = "/not_there";
  const said = await failure(launched(url.href).program);
  for (const word of ["not_there", `${url.hostname}:${url.port || 5432}`])
    expect(said).toContain(word);
});

const pooled = { ...onPostgres, make: postgresDatabase, isMissing: noPgBouncer !== "" };

scenario(pooled, `behind PgBouncer, by transaction, nothing fails${noPgBouncer}`, async (table) => {
  const databaseUrl = await pgBouncer(table);
  const both = [await instance(table, { databaseUrl }), await instance(table, { databaseUrl })];
  const urls = both.map(({ url }) => url);
  for (let round = 0; round < 5; round++) {
    const sent = Array.from({ length: 20 }, async (_, index) => {
      const url = urls[index % 2]!;
      return index % 3 ? await assert(url) : await token(url, await newProof());
    });
    const statuses = (await Promise.all(sent)).map(({ status }) => status);
    expect(new Set(statuses)).toEqual(new Set([200]));
  }
  for (const url of urls) expect(await health(url)).toBe("ok");
});
