/** Several instances on one database, and what happens when they or the database go away. */

import { SQL } from "bun";
import { afterAll, describe, expect, test } from "bun:test";
import { Database } from "bun:sqlite";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import * as jose from "jose";
import { authorizationServer } from "../config.ts";
import { boot, canServe, execute, freshSchema, PostgresServer, postgresUrl } from "./database.ts";
import { type Row, sqlite, stopInstances, Table } from "./database.ts";
import { cleanUp, eventually, freeOrigin, launch, type Program } from "./support.ts";
import { temporaryDirectory } from "./support.ts";

/** More rounds and a longer load: SOAK=50. */
const soak = Number(process.env["SOAK"] ?? 0);
const rounds = soak || 10;
const loadSeconds = soak ? 20 : 5;
const patience = 30_000 + soak * 4_000;
const rotation = authorizationServer.signingKeys.rotationSeconds;
const secondsNow = () => Math.floor(Date.now() / 1000);

afterAll(async () => {
  await cleanUp();
  await stopInstances();
});

const engines = [{ engine: "SQLite", make: async () => sqlite() }];
if (postgresUrl) {
  engines.push({ engine: "PostgreSQL", make: async () => new Table(await freshSchema()) });
} else {
  test.skip("instances, PostgreSQL: all of it needs TEST_DATABASE_URL", () => {});
}

// --- Requests ------------------------------------------------------------------------------------

const proofKey = await jose.generateKeyPair("ES256");
const proofJwk = await jose.exportJWK(proofKey.publicKey);

function proofFor(issuer: string): Promise<string> {
  const claims = { htm: "POST", htu: `${issuer}/connect/token`, jti: crypto.randomUUID() };
  const header = { alg: "ES256", typ: "dpop+jwt", jwk: proofJwk };
  return new jose.SignJWT(claims)
    .setProtectedHeader(header)
    .setIssuedAt()
    .sign(proofKey.privateKey);
}

/** A token request with a secret, and with a proof if one is given. */
async function requestToken(origin: string, dpop?: string): Promise<Response> {
  return await fetch(`${origin}/connect/token`, {
    method: "POST",
    headers: { authorization: `Basic ${btoa("client:secret")}`, ...(dpop && { dpop }) },
    body: new URLSearchParams({ grant_type: "client_credentials" }),
    signal: AbortSignal.timeout(8_000),
  }).catch(({ message }) => {
    throw new Error(`${origin} did not answer: ${message}`);
  });
}

const tokenIn = async (answer: Response) => {
  const { access_token } = (await answer.json()) as { access_token: string };
  return { access_token, kid: jose.decodeProtectedHeader(access_token).kid! };
};
const json = async (url: string) => (await fetch(url)).json() as Promise<Record<string, unknown>>;
const jwksOf = async (origin: string) => {
  const { keys } = await json(`${origin}/.well-known/openid-configuration/jwks`);
  return (keys as jose.JWK[]).map(({ kid }) => kid!);
};
const statusOf = async (origin: string) => (await json(`${origin}/health`))["status"];

// --- Processes -----------------------------------------------------------------------------------

/** Programs that wait for one another just before they load what they run. */
class Gate {
  readonly #open = join(temporaryDirectory(), "open");
  readonly env: Record<string, string>;

  constructor() {
    const preload = join(dirname(this.#open), "gate.ts");
    writeFileSync(
      preload,
      `import { existsSync } from "node:fs";
      console.error("at the gate");
      while (!existsSync(process.env.GATE)) Bun.sleepSync(1);`,
    );
    this.env = { BUN_OPTIONS: `--preload=${preload}`, GATE: this.#open };
  }

  async open(waiting: Program[]): Promise<void> {
    await Promise.all(waiting.map((program) => program.printed(/at the gate/)));
    writeFileSync(this.#open, "");
  }
}

interface Instance {
  origin: string;
  program: Program;
}

/** An instance for `issuer` at an address of its own, or at that of the issuer. */
function instance(
  table: Table,
  issuer: string,
  { origin = freeOrigin(), env = {}, rotationSeconds = 0 } = {},
): Instance {
  const signingKeys = { algorithms: ["ES256"], rotationSeconds, retentionSeconds: 5, ...scaled };
  const [client] = authorizationServer.clients;
  const clients = [{ ...client!, access_token_lifetime_seconds: 3 }];
  const changes = { authorizationServer: { signingKeys, clients } };
  const program = launch("idp", {
    env: {
      ...{ ISSUER: issuer, ISSUER_LISTEN: new URL(origin).host, DATABASE_URL: table.url },
      ...env,
    },
    ...(rotationSeconds && { changes }),
  });
  return { origin, program };
}

const scaled = { pollSeconds: 0.2, maxAgeSeconds: 0.1, refreshSeconds: 0.3, coolDownSeconds: 0.1 };
const started = (instances: Instance[]) =>
  Promise.all(instances.map(({ program }) => program.printed(/authorization server/)));
const stopped = (programs: Program[]) => Promise.all(programs.map((program) => program.stop()));

// --- Together ------------------------------------------------------------------------------------

for (const { engine, make } of engines) {
  test.concurrent(
    `instances, ${engine}: 8 that start at one instant on an empty database → the same two keys`,
    async () => {
      const table = await make();
      const issuer = freeOrigin();
      const gate = new Gate();
      const all = Array.from({ length: 8 }, () => instance(table, issuer, { env: gate.env }));
      await gate.open(all.map(({ program }) => program));
      await started(all);
      const rows = await table.rows();
      expect(rows.map(({ generation }) => generation)).toEqual([1, 2]);
      expect(rows[1]!.signs_from).toBe(rows[0]!.signs_until);
      for (const { origin } of all) {
        expect(await jwksOf(origin)).toEqual(rows.map(({ kid }) => kid));
        const answer = await requestToken(origin);
        expect([answer.status, (await tokenIn(answer)).kid]).toEqual([200, rows[0]!.kid]);
      }
      // One proof, sent to all of them at once, is used once.
      const proof = await proofFor(issuer);
      const answers = await Promise.all(all.map(({ origin }) => requestToken(origin, proof)));
      const statuses = answers.map(({ status }) => status).sort();
      expect(statuses).toEqual([200, 400, 400, 400, 400, 400, 400, 400]);
      await stopped(all.map(({ program }) => program));
      await table.close();
    },
    patience,
  );
}

// --- Killed --------------------------------------------------------------------------------------

const seed = Number(process.env["SEED"] ?? Date.now() % 1_000_000);
console.log(`SEED=${seed} repeats the moments at which the instances are killed`);

/** Numbers from 0 to 1, the same for the same seed (mulberry32). */
function randomNumbers(state: number): () => number {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** Starts an instance and kills it at some moment of its start. */
async function killAtStart(table: Table, random: () => number): Promise<void> {
  const gate = new Gate();
  const { program } = instance(table, freeOrigin(), { env: gate.env });
  await gate.open([program]);
  // From before it opens the database until shortly after it listens.
  await Bun.sleep(60 * random());
  await program.stop("SIGKILL");
}

/** The rows, none if there is no table yet; SQLite is repaired by the first who reads. */
async function rowsAfterKill({ url }: Table): Promise<Row[]> {
  const table = new Table(url);
  const rows = await table.rows().catch(() => []);
  await table.disconnect();
  return rows;
}

for (const { engine, make } of engines) {
  test.concurrent(
    `instances, ${engine}: kill -9 during the first start, ${rounds} times → the next one works`,
    async () => {
      const random = randomNumbers(seed);
      for (let round = 0; round < rounds; round++) {
        const table = await make();
        await killAtStart(table, random);
        const before = round % 2 ? await rowsAfterKill(table) : [];
        const idp = await boot(table);
        const after = await table.rows();
        expect(after.slice(0, before.length)).toEqual(before);
        expect(after.map(({ generation }) => generation)).toEqual([1, 2]);
        expect(after[1]!.signs_from).toBe(after[0]!.signs_until);
        expect(idp.publicKeys(secondsNow()).map(({ kid }) => kid)).toEqual(
          after.map(({ kid }) => kid),
        );
        await table.close();
      }
    },
    patience,
  );

  test.concurrent(
    `instances, ${engine}: kill -9 while a key is made, ${rounds} times → no key is lost`,
    async () => {
      const random = randomNumbers(seed + 1);
      const table = await make();
      await boot(table);
      for (let round = 0; round < rounds; round++) {
        await table.age(rotation);
        const before = (await table.rows()).filter(({ removed_at }) => removed_at > secondsNow());
        await killAtStart(table, random);
        const killed = round % 2 ? await rowsAfterKill(table) : before;
        expect(killed.filter(({ kid }) => before.some((row) => row.kid === kid))).toEqual(before);
        const idp = await boot(table);
        const after = (await table.rows()).slice(-before.length - 1);
        expect(after.slice(0, -1)).toEqual(before);
        expect(after.at(-1)!.generation).toBe(before.at(-1)!.generation + 1);
        expect(after.at(-1)!.signs_from).toBe(before.at(-1)!.signs_until);
        expect(idp.signingKey(secondsNow())!.kid).toBe(after.at(-2)!.kid);
      }
      await table.close();
    },
    patience,
  );
}

// --- Rotation under load -------------------------------------------------------------------------

/**
 * Two instances and an API, for some seconds: every token, when it is issued and again later, must
 * be accepted. Returns the refusals and the keys, in the order in which they signed first.
 */
async function underLoad(
  table: Table,
  rotationSeconds: number,
  during: (kids: Set<string>) => Promise<unknown>,
) {
  const issuer = freeOrigin();
  const resource = freeOrigin();
  const env = { API_URL: resource };
  const first = instance(table, issuer, { origin: issuer, rotationSeconds, env });
  const second = instance(table, issuer, { rotationSeconds, env });
  const api = launch("api", {
    env: { ISSUER: issuer, ...env },
    changes: { resourceServer: scaled },
  });
  await Promise.all([started([first, second]), api.printed(/API/)]);
  const kids = new Set<string>();
  const refusals: { kid: string; status: number; answer: string }[] = [];
  const end = performance.now() + loadSeconds * 1000;
  const random = randomNumbers(seed + 2);
  let calls = 0;
  const call = async ({ kid, access_token }: { kid: string; access_token: string }) => {
    const headers = { authorization: `Bearer ${access_token}` };
    const answer = await fetch(`${resource}/identity`, { headers });
    const text = await answer.text();
    calls += 1;
    if (answer.status !== 200) refusals.push({ kid, status: answer.status, answer: text });
  };
  const work = async (origin: string) => {
    const held: { kid: string; access_token: string; until: number }[] = [];
    while (performance.now() < end) {
      const answer = await requestToken(origin);
      if (answer.status !== 200) throw new Error(`no token: ${answer.status}`);
      const issued = await tokenIn(answer);
      kids.add(issued.kid);
      await call(issued);
      held.push({ ...issued, until: performance.now() + 3_000 });
      while (held[0]!.until < performance.now()) held.shift();
      await call(held[Math.floor(held.length * random())]!);
      await Bun.sleep(10);
    }
  };
  await Promise.all([...[first, second].map(({ origin }) => work(origin)), during(kids)]);
  const published = [await jwksOf(first.origin), await jwksOf(second.origin)];
  await stopped([first.program, second.program, api]);
  return { refusals, kids: [...kids], calls, published };
}

for (const { engine, make } of engines) {
  test.concurrent(
    `instances, ${engine}: a new key every 2 s under load, ${loadSeconds} s → no token is refused`,
    async () => {
      const table = await make();
      const { refusals, kids, calls } = await underLoad(table, 2, async () => {});
      expect(refusals.slice(0, 3)).toEqual([]);
      expect(kids.length).toBeGreaterThan(loadSeconds / 2);
      expect(calls).toBeGreaterThan(20 * loadSeconds);
      await table.close();
    },
    patience,
  );

  test.concurrent(
    `instances, ${engine}: a row deleted under load → no token is refused but those of its key`,
    async () => {
      const table = await make();
      let deleted = "";
      const { refusals, kids, published } = await underLoad(table, 3, async (seen) => {
        await eventually("a key that signed for a second is deleted", async () => {
          const now = secondsNow();
          const due = (await table.rows()).find(({ signs_until }) => signs_until > now)!;
          const ready = seen.has(due.kid) && now > due.signs_from;
          if (ready) await table.sql`DELETE FROM signing_keys WHERE kid = ${due.kid}`;
          deleted = ready ? due.kid : "";
          return ready;
        });
      });
      expect(kids).toContain(deleted);
      const others = refusals.filter(({ kid, status }) => kid !== deleted || status !== 401);
      expect(others.slice(0, 3)).toEqual([]);
      expect(refusals.length).toBeGreaterThan(0);
      expect(kids.indexOf(deleted)).toBeLessThan(kids.length - 1);
      expect(published.flat()).not.toContain(deleted);
      await table.close();
    },
    patience,
  );
}

// --- A SQLite file that is in use ----------------------------------------------------------------

/** A database file that does not exist before, and that another program keeps locked. */
function lockedFile() {
  const table = sqlite();
  const file = table.url.slice("sqlite://".length);
  mkdirSync(dirname(file));
  const other = new Database(file, { create: true });
  other.run("BEGIN EXCLUSIVE");
  return { table, other };
}

test.concurrent(
  "instances, SQLite: another program lets go of the file after 1.5 s → the start waits for it",
  async () => {
    const { table, other } = lockedFile();
    const gate = new Gate();
    const idp = instance(table, freeOrigin(), { env: gate.env });
    await gate.open([idp.program]);
    await Bun.sleep(1_500); // longer than its busy_timeout
    expect(idp.program.stderr).not.toContain("authorization server");
    other.run("ROLLBACK");
    other.close();
    await started([idp]);
    expect(await statusOf(idp.origin)).toBe("ok");
    await idp.program.stop();
  },
  patience,
);

test.concurrent(
  "instances, SQLite: another program keeps the file → one line, exit code 1",
  async () => {
    const { table, other } = lockedFile();
    const { program } = instance(table, freeOrigin());
    expect(await program.ended()).toBe(1);
    expect(program.stderr).toBe("error: Cannot use the database: database is locked\n");
    other.close();
  },
  patience,
);

test.concurrent(
  "instances: a database that takes connections and never answers → one line, exit code 1",
  async () => {
    const silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    const table = new Table(`postgres://postgres@127.0.0.1:${silent.port}/postgres`);
    const { program } = instance(table, freeOrigin());
    expect(await program.ended()).toBe(1);
    const reason = "no answer of the database in 2 s";
    expect(program.stderr).toBe(`error: Cannot use the database: ${reason}\n`);
    silent.stop(true);
  },
  patience,
);

// --- PostgreSQL goes away ------------------------------------------------------------------------

describe.if(postgresUrl !== undefined)("PostgreSQL", () => {
  test.concurrent(
    "instances, PostgreSQL: a role without CREATE runs on existing tables",
    async () => {
      const table = new Table(await freshSchema());
      await boot(table);
      const rows = await table.rows();
      const schema = new URL(table.url).searchParams.get("search_path")!;
      const role = `role_${schema}`;
      await execute(
        postgresUrl!,
        `CREATE ROLE ${role} LOGIN; GRANT USAGE ON SCHEMA ${schema} TO ${role};
       GRANT SELECT, INSERT, DELETE ON ALL TABLES IN SCHEMA ${schema} TO ${role}`,
      );
      const url = new URL(table.url);
      url.username = role;
      const issuer = freeOrigin();
      const limited = instance(new Table(url.href), issuer, { origin: issuer });
      await started([limited]);
      expect(await jwksOf(issuer)).toEqual(rows.map(({ kid }) => kid));
      expect((await requestToken(issuer, await proofFor(issuer))).status).toBe(200);
      await table.change("DELETE FROM signing_keys");
      await limited.program.stop();
      // It also makes keys, and without tables it says what it may not do.
      const again = instance(new Table(url.href), issuer, { origin: issuer });
      await started([again]);
      expect(await table.rows()).toHaveLength(2);
      await again.program.stop();
      await table.change("DROP TABLE signing_keys, used_jtis");
      const { program } = instance(new Table(url.href), freeOrigin());
      expect(await program.ended()).toBe(1);
      const reason = `permission denied for schema ${schema}`;
      expect(program.stderr).toBe(`error: Cannot use the database: ${reason}\n`);
      await table.close();
      await execute(postgresUrl!, `DROP ROLE ${role}`);
    },
    10_000,
  );

  /** What another program does in a transaction that it has not committed yet. */
  async function transaction(url: string, statement: string) {
    const sql = new SQL(url, { max: 1 });
    await sql.unsafe(`BEGIN; ${statement}`);
    return { commit: () => sql.unsafe("COMMIT").finally(() => sql.close()) };
  }

  test.concurrent(
    "instances, PostgreSQL: another program makes a table just now → the start waits, and tries again",
    async () => {
      const table = new Table(await freshSchema());
      const columns = "id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL";
      const other = await transaction(table.url, `CREATE TABLE used_jtis (${columns})`);
      const idp = instance(table, freeOrigin());
      const schema = new URL(table.url).searchParams.get("search_path")!;
      const observer = new SQL(postgresUrl!, { max: 1 });
      await eventually("it waits for the other", async () => {
        const waiting = await observer`SELECT 1 FROM pg_stat_activity
          WHERE application_name = ${schema} AND wait_event_type = 'Lock'`;
        return waiting.length > 0;
      });
      await observer.close();
      await other.commit();
      await started([idp]);
      expect(await table.rows()).toHaveLength(2);
      await idp.program.stop();
      await table.close();
    },
    patience,
  );

  test.concurrent(
    "instances, PostgreSQL: slow → a proof waits, too slow → 503; secrets do not wait",
    async () => {
      const table = new Table(await freshSchema());
      const issuer = freeOrigin();
      const idp = instance(table, issuer, { origin: issuer });
      await started([idp]);
      const slow = await transaction(table.url, "LOCK TABLE used_jtis");
      const waiting = requestToken(issuer, await proofFor(issuer));
      expect((await requestToken(issuer)).status).toBe(200);
      expect(Bun.peek.status(waiting)).toBe("pending");
      await slow.commit();
      expect((await waiting).status).toBe(200);

      const tooSlow = await transaction(table.url, "LOCK TABLE used_jtis");
      const refused = requestToken(issuer, await proofFor(issuer));
      expect((await requestToken(issuer)).status).toBe(200);
      expect((await refused).status).toBe(503);
      expect(await statusOf(issuer)).toBe("degraded");
      await tooSlow.commit();
      expect((await requestToken(issuer, await proofFor(issuer))).status).toBe(200);
      await idp.program.stop();
      await table.close();
    },
    patience,
  );

  test.concurrent.skipIf(!canServe)(
    `instances, PostgreSQL${canServe ? "" : " (needs its programs)"}: frozen, stopped, started again`,
    async () => {
      const server = new PostgresServer();
      await server.start();
      const table = new Table(await freshSchema(server.url));
      const url = new URL(table.url);
      url.searchParams.delete("max"); // as an operator runs it
      const issuer = freeOrigin();
      const rotationSeconds = 60;
      const { program } = instance(new Table(url.href), issuer, {
        origin: issuer,
        rotationSeconds,
      });
      // One that does not poll meanwhile, so that the requests alone find out.
      const other = instance(new Table(url.href), issuer);
      await started([{ origin: issuer, program }, other]);
      const proof = await proofFor(issuer);
      expect((await requestToken(other.origin, await proofFor(issuer))).status).toBe(200);
      expect((await requestToken(issuer, proof)).status).toBe(200);

      const statuses: number[] = [];
      let loaded = true;
      const load = (async () => {
        while (loaded) {
          statuses.push((await requestToken(issuer)).status);
          await Bun.sleep(20);
        }
      })();

      /** Requests that need the database are refused soon, several at once too. */
      const away = async () => {
        const begun = performance.now();
        const origins = [issuer, issuer, issuer, other.origin];
        const requests = origins.map(async (at) => requestToken(at, await proofFor(issuer)));
        for (const answer of await Promise.all(requests)) {
          expect([answer.status, answer.headers.get("retry-after")]).toEqual([503, "5"]);
          expect(await answer.json()).toMatchObject({ error: "temporarily_unavailable" });
        }
        expect(performance.now() - begun).toBeLessThan(4_000);
        await eventually("degraded", async () => (await statusOf(issuer)) === "degraded");
        await eventually("database away", () => count("database away") > 0);
      };
      const back = async () => {
        await eventually("ok", async () => (await statusOf(issuer)) === "ok", 10);
        await eventually("database back", () => count("database back") > 0);
        expect((await requestToken(issuer, await proofFor(issuer))).status).toBe(200);
        program.stdout = "";
      };
      const count = (event: string) => program.log.filter((line) => line["event"] === event).length;

      server.freeze();
      await away();
      const late = instance(table, freeOrigin());
      expect(await late.program.ended()).toBe(1);
      expect(late.program.stderr).toMatch(/^error: Cannot use the database: .+\n$/);
      server.thaw();
      await back();
      await server.stop();
      await away();
      await server.start();
      await back();

      // What was used before is still used.
      const replay = await requestToken(issuer, proof);
      expect([replay.status, await replay.json()]).toMatchObject([
        400,
        { error: "invalid_dpop_proof" },
      ]);
      loaded = false;
      await load;
      expect(statuses.length).toBeGreaterThan(50);
      expect([...new Set(statuses)]).toEqual([200]);
      await program.stop();
      await server.stop();
    },
    patience,
  );
});
