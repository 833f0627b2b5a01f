/** Signing keys: their life, their rows, their secret, on every engine. */

import { afterAll, expect, spyOn, test } from "bun:test";
import { Database } from "bun:sqlite";
import { chmodSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import * as jose from "jose";
import { boot, freshSchema, type Idp, postgresUrl, type Row } from "./database.ts";
import { type Settings, sqlite, stopInstances, stopPolls, Table } from "./database.ts";
import { captureLog, cleanUp, eventually, freeOrigin, freePort, Program } from "./support.ts";
import { root, temporaryDirectory, thumbprint, withinOneSecond } from "./support.ts";

const day = 86_400;
const rotation = 90 * day;
const retention = 14 * day;
const newSecret = () =>
  Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url");
const secondsNow = () => Math.floor(Date.now() / 1000);

const log = captureLog();

afterAll(async () => {
  await stopInstances();
  log.stop();
  await cleanUp();
});

const refused = (starting: Promise<unknown>) =>
  starting.then(
    () => "started",
    (error: Error) => error.message,
  );
const kids = (idp: Idp, at: number) => idp.publicKeys(at).map(({ kid }) => kid!);
const kidsOf = (rows: Row[]) => rows.map(({ kid }) => kid);
const unopened = ({ kid }: Row) =>
  `Cannot use the database: KEY_ENCRYPTION_SECRET lacks the secret of key ${kid}`;
const garble = (generation: number) =>
  `UPDATE signing_keys SET jwk = 'garbled' WHERE generation = ${generation}`;
const remove = (generation: number) => `DELETE FROM signing_keys WHERE generation = ${generation}`;

// --- On every engine -----------------------------------------------------------------------------

const postgres = async () => new Table(await freshSchema());
const engines = [{ engine: "SQLite", make: async () => sqlite() }];
if (postgresUrl) engines.push({ engine: "PostgreSQL", make: postgres });
else test.skip("signing keys, PostgreSQL: all of it needs TEST_DATABASE_URL", () => {});

for (const { engine, make } of engines) {
  const scenario = (name: string, run: (table: Table) => Promise<void>) =>
    test(`signing keys, ${engine}: ${name}`, async () => {
      const table = await make();
      await run(table).finally(stopPolls);
      await table.close();
    });

  /** A first instance on an empty table, its first second, and its two rows. */
  const begin = async (table: Table, settings: Settings = {}, secret = "") => {
    const idp = await boot(table, settings, { secret });
    const rows = await table.rows();
    return { idp, rows, t0: rows[0]!.signs_from };
  };

  scenario("the first start makes two keys; the second follows the first", async (table) => {
    const before = secondsNow();
    const { idp, rows, t0 } = await begin(table);
    expect([t0 >= before, t0 <= secondsNow()]).toEqual([true, true]);
    const second = t0 + rotation;
    expect(await table.dates()).toEqual([
      [1, t0, second, second + retention],
      [2, second, second + rotation, second + rotation + retention],
    ]);
    expect(kids(idp, t0)).toEqual(kidsOf(rows));
    await boot(table);
    await idp.refresh();
    expect(await table.rows()).toEqual(rows);
  });

  scenario(
    "a key signs until just before signs_until, is public until removed_at",
    async (table) => {
      const { idp, rows, t0 } = await begin(table);
      const [first, second] = kidsOf(rows) as [string, string];
      const signing = [-1, 0, 1, rotation - 1, rotation, rotation + 1, 2 * rotation - 1];
      expect(signing.map((after) => idp.signingKey(t0 + after)?.kid)).toEqual([
        ...[first, first, first, first],
        ...[second, second, second],
      ]);
      expect(idp.signingKey(t0 + 2 * rotation)).toBeUndefined();
      const removed = t0 + rotation + retention;
      expect([-1, 0, 1].map((after) => kids(idp, removed + after))).toEqual([
        [first, second],
        [second],
        [second],
      ]);
      expect(kids(idp, removed + rotation - 1)).toEqual([second]);
      expect(kids(idp, removed + rotation)).toEqual([]);
    },
  );

  scenario(
    "years: always one that signs, one to follow, and those of old tokens",
    async (table) => {
      const { idp, t0 } = await begin(table);
      const known = new Map<number, string>();
      const steps = [-1, 0, 1, retention - 1, retention, retention + 1];
      steps.push(2 * retention, 2 * retention + 1);
      for (const at of [...Array(13).keys()].flatMap((n) =>
        steps.map((s) => t0 + n * rotation + s),
      )) {
        await idp.refresh(at);
        const rows = await table.rows();
        for (const { generation, kid } of rows) {
          if (!known.has(generation)) known.set(generation, kid);
          expect(kid).toBe(known.get(generation)!);
        }
        const signing = Math.max(0, Math.floor((at - t0) / rotation)) + 1;
        const all = [...Array(signing + 1).keys()].map((index) => index + 1);
        const removedAt = (generation: number) => t0 + generation * rotation + retention;
        const stored = all.filter((generation) => removedAt(generation) >= at - retention);
        expect(await table.dates()).toEqual(
          stored.map((g) => [g, t0 + (g - 1) * rotation, t0 + g * rotation, removedAt(g)]),
        );
        expect(idp.signingKey(at)!.kid).toBe(known.get(signing)!);
        const published = all.filter((generation) => removedAt(generation) > at);
        expect(kids(idp, at)).toEqual(published.map((generation) => known.get(generation)!));
      }
      expect(new Set(known.values()).size).toBe(14);
    },
  );

  scenario("a start while some keys are over loads them and goes on", async (table) => {
    const { rows } = await begin(table);
    await table.age(rotation + day);
    const idp = await boot(table);
    const now = secondsNow();
    const all = await table.rows();
    expect(kidsOf(all).slice(0, 2)).toEqual(kidsOf(rows));
    expect(all.map(({ generation }) => generation)).toEqual([1, 2, 3]);
    expect(all[2]!.signs_from).toBe(all[1]!.signs_until);
    expect(idp.signingKey(now)!.kid).toBe(rows[1]!.kid);
    expect(kids(idp, now)).toEqual(kidsOf(all));
  });

  scenario("off for almost two rotations: the successor signs, a third follows", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await idp.refresh(t0 + 2 * rotation - 1);
    expect(idp.signingKey(t0 + 2 * rotation - 1)!.kid).toBe(rows[1]!.kid);
    expect((await table.dates()).at(-1)!.slice(0, 2)).toEqual([3, t0 + 2 * rotation]);
  });

  scenario("off for two rotations: a new key signs at once", async (table) => {
    const { idp, t0 } = await begin(table);
    const at = t0 + 2 * rotation;
    await idp.refresh(at);
    const [, second, third, fourth] = [null, ...(await table.rows())];
    expect([second!.generation, third!.generation, fourth!.generation]).toEqual([2, 3, 4]);
    expect([third!.signs_from, fourth!.signs_from]).toEqual([at, at + rotation]);
    expect(idp.signingKey(at)!.kid).toBe(third!.kid);
    // What the last key signed while the server was up stays valid.
    expect(kids(idp, at)).toEqual(kidsOf([second!, third!, fourth!]));
  });

  scenario("off for longer, then started: a new key signs at once", async (table) => {
    const { rows } = await begin(table);
    await table.age(2 * rotation + day);
    const before = secondsNow();
    const idp = await boot(table);
    const all = await table.rows();
    expect(all.map(({ generation }) => generation)).toEqual([2, 3, 4]);
    expect(all[0]!.kid).toBe(rows[1]!.kid);
    expect([all[1]!.signs_from >= before, all[1]!.signs_from <= secondsNow()]).toEqual([
      true,
      true,
    ]);
    expect(all[2]!.signs_from).toBe(all[1]!.signs_until);
    expect(idp.signingKey(secondsNow())!.kid).toBe(all[1]!.kid);
  });

  scenario(
    "clocks some seconds apart: the same keys, each public before it signs",
    async (table) => {
      const { idp: right, rows, t0 } = await begin(table);
      const behind = await boot(table);
      const ahead = await boot(table);
      await behind.refresh(t0 - 5);
      expect(behind.signingKey(t0 - 5)!.kid).toBe(rows[0]!.kid);
      expect(await table.rows()).toEqual(rows);
      const at = t0 + rotation - 3;
      await ahead.refresh(at + 5);
      await right.refresh(at);
      await behind.refresh(at - 5);
      const all = await table.rows();
      expect(all.slice(0, 2)).toEqual(rows);
      expect((await table.dates())[2]!.slice(0, 2)).toEqual([3, t0 + 2 * rotation]);
      const signing = [ahead.signingKey(at + 5), right.signingKey(at), behind.signingKey(at - 5)];
      expect(signing.map((key) => key!.kid)).toEqual([rows[1]!.kid, rows[0]!.kid, rows[0]!.kid]);
      for (const idp of [ahead, right, behind]) expect(kids(idp, at)).toEqual(kidsOf(all));
    },
  );

  scenario("a key made by a clock that is ahead signs here at once", async (table) => {
    const { idp: ahead, t0 } = await begin(table);
    const right = await boot(table);
    await table.change("DELETE FROM signing_keys");
    await ahead.refresh(t0 + 20);
    const rows = await table.rows();
    expect(rows[0]!.signs_from).toBe(t0 + 20);
    await right.refresh(t0);
    expect(right.signingKey(t0)!.kid).toBe(rows[0]!.kid);
    expect(await table.rows()).toEqual(rows);
  });

  scenario(
    "the row that signs is deleted: its successor signs, a new one follows",
    async (table) => {
      const { idp, rows, t0 } = await begin(table);
      await table.change(remove(1));
      expect(idp.signingKey(t0 + 10)!.kid).toBe(rows[0]!.kid);
      await idp.refresh(t0 + 10);
      const all = await table.rows();
      expect(all[0]).toEqual(rows[1]!);
      expect((await table.dates())[1]).toEqual([
        ...[3, t0 + 2 * rotation, t0 + 3 * rotation],
        t0 + 3 * rotation + retention,
      ]);
      expect(idp.signingKey(t0 + 10)!.kid).toBe(rows[1]!.kid);
      expect(kids(idp, t0 + 10)).toEqual(kidsOf(all));
    },
  );

  scenario("the successor's row is deleted: another one is made in its place", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await table.change(remove(2));
    await idp.refresh(t0 + 10);
    const all = await table.rows();
    expect(all[0]).toEqual(rows[0]!);
    expect((await table.dates())[1]!.slice(0, 2)).toEqual([2, t0 + rotation]);
    expect(all[1]!.kid).not.toBe(rows[1]!.kid);
    expect(kids(idp, t0 + 10)).toEqual(kidsOf(all));
    expect(idp.signingKey(t0 + 10)!.kid).toBe(rows[0]!.kid);
  });

  scenario("the row of a key that signed before is deleted: only that is gone", async (table) => {
    const { idp, t0 } = await begin(table);
    await idp.refresh(t0 + rotation);
    const rows = await table.rows();
    await table.change(remove(1));
    await idp.refresh(t0 + rotation + 1);
    expect(await table.rows()).toEqual(rows.slice(1));
    expect(kids(idp, t0 + rotation + 1)).toEqual(kidsOf(rows.slice(1)));
  });

  scenario("all rows are deleted: a new key signs at once", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await table.change("DELETE FROM signing_keys");
    await idp.refresh(t0 + day);
    const all = await table.rows();
    expect((await table.dates()).map((dates) => dates.slice(0, 2))).toEqual([
      [1, t0 + day],
      [2, t0 + day + rotation],
    ]);
    expect(idp.signingKey(t0 + day)!.kid).toBe(all[0]!.kid);
    expect(kids(idp, t0 + day)).toEqual(kidsOf(all));
    expect(kidsOf(all)).not.toContain(rows[0]!.kid);
  });

  scenario("a key that only overlaps the signing one is no successor", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await table.change(
      `UPDATE signing_keys SET signs_from = ${t0 + rotation - 1} WHERE generation = 2`,
    );
    await idp.refresh(t0 + 1);
    expect((await table.dates()).map((dates) => dates.slice(0, 2))).toEqual([
      [1, t0],
      [2, t0 + rotation - 1],
      [3, t0 + rotation],
    ]);
    expect(idp.signingKey(t0 + rotation)!.kid).toBe(rows[1]!.kid);
  });

  scenario("keys sign in the order of signs_from, then of generation", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    const [first, second] = kidsOf(rows);
    await table.change(`UPDATE signing_keys SET generation = 3 WHERE generation = 1`);
    await idp.refresh(t0 + 1);
    expect(kids(idp, t0 + 1)).toEqual([first!, second!]);
    expect(idp.signingKey(t0 + 1)!.kid).toBe(first!);
    await table.change(`UPDATE signing_keys SET signs_from = ${t0 + rotation}`);
    await idp.refresh(t0 + 1);
    expect(idp.signingKey(t0 + 1)!.kid).toBe(second!);
  });

  scenario("several algorithms: two keys of each, the first algorithm signs", async (table) => {
    const algorithms = ["Ed25519", "ES256", "ML-DSA-44"];
    const { idp, t0 } = await begin(table, { algorithms });
    for (const at of [t0, t0 + rotation, t0 + 2 * rotation]) await idp.refresh(at);
    for (const alg of algorithms) {
      const dates = (await table.dates(alg)).slice(-4);
      expect(dates.map(([generation]) => generation)).toEqual([2, 3, 4]);
      expect(dates[0]![1]).toBe(dates[1]![1]! - rotation);
    }
    const at = t0 + 2 * rotation;
    expect(idp.signingKey(at)!.alg).toBe("Ed25519");
    const published = idp.publicKeys(at).map(({ alg }) => alg!);
    expect(published.sort()).toEqual(algorithms.flatMap((alg) => [alg, alg, alg]).sort());
  });

  scenario("change of algorithm: second, then first, then alone", async (table) => {
    const old = await begin(table);
    const { t0 } = old;
    const second = await boot(table, { algorithms: ["ES256", "Ed25519"] });
    const [es1, es2, ed1, ed2] = kidsOf(await table.rows());
    expect([...kids(second, t0)].sort()).toEqual([es1!, es2!, ed1!, ed2!].sort());
    expect(second.signingKey(t0 + 1)!.kid).toBe(es1!);
    // The instance that does not know the new algorithm yet publishes its keys all the same.
    await old.idp.refresh(t0 + 1);
    expect([...kids(old.idp, t0 + 1)].sort()).toEqual([...kids(second, t0 + 1)].sort());
    const first = await boot(table, { algorithms: ["Ed25519", "ES256"] });
    expect(first.signingKey(t0 + 1)!.kid).toBe(ed1!);
    expect([...kids(first, t0)].sort()).toEqual([es1!, es2!, ed1!, ed2!].sort());
    const alone = await boot(table, { algorithms: ["Ed25519"] });
    expect(alone.signingKey(t0 + 1)!.kid).toBe(ed1!);
    expect(await table.dates()).toHaveLength(2);
    for (const [at, published] of [
      [t0 + rotation, [es1, es2]],
      [t0 + rotation + retention - 1, [es1, es2]],
      [t0 + rotation + retention, [es2]],
      [t0 + 2 * rotation + retention - 1, [es2]],
      [t0 + 2 * rotation + retention, []],
    ] as const) {
      await alone.refresh(at);
      const keys = alone.publicKeys(at).filter(({ alg }) => alg === "ES256");
      expect(keys.map(({ kid }) => kid)).toEqual([...published]);
    }
    expect(alone.signingKey(t0 + 2 * rotation + retention)!.alg).toBe("Ed25519");
    await alone.refresh(t0 + 2 * rotation + 2 * retention);
    expect(await table.dates()).toHaveLength(1);
    await alone.refresh(t0 + 2 * rotation + 2 * retention + 1);
    expect(await table.dates()).toHaveLength(0);
  });

  scenario("another rotation and retention: no key gets other dates", async (table) => {
    const { rows, t0 } = await begin(table);
    const sooner = { rotationSeconds: 70 * day, retentionSeconds: 20 * day };
    const idp = await boot(table, sooner);
    expect(await table.rows()).toEqual(rows);
    await idp.refresh(t0 + rotation - 1);
    expect(await table.rows()).toEqual(rows);
    await idp.refresh(t0 + rotation);
    const all = await table.rows();
    expect(all.slice(0, 2)).toEqual(rows);
    expect((await table.dates())[2]).toEqual([
      ...[3, t0 + 2 * rotation, t0 + 2 * rotation + 70 * day],
      t0 + 2 * rotation + 90 * day,
    ]);
    const removed = rows[0]!.removed_at;
    expect([kids(idp, removed - 1), kids(idp, removed)]).toEqual([
      kidsOf(all),
      kidsOf(all.slice(1)),
    ]);
  });

  scenario("a row whose dates are changed by hand counts as it is", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    const { privateKey } = idp.signingKey(t0)!;
    await table.change(`UPDATE signing_keys SET removed_at = ${t0 + 5} WHERE generation = 1`);
    await idp.refresh(t0 + 1);
    expect(kids(idp, t0 + 4)).toEqual(kidsOf(rows));
    expect(kids(idp, t0 + 5)).toEqual([rows[1]!.kid]);
    expect(idp.signingKey(t0)!.removed_at).toBe(t0 + 5);
    // What was opened once is not opened again.
    expect(idp.signingKey(t0)!.privateKey).toBe(privateKey);
  });

  scenario(
    "the row that signs cannot be opened while running: passed over, logged",
    async (table) => {
      const { idp, rows, t0 } = await begin(table);
      await table.change(garble(1));
      await idp.refresh(t0 + 10);
      expect(idp.signingKey(t0 + 10)!.kid).toBe(rows[1]!.kid);
      const all = await table.rows();
      expect(all.slice(0, 2)).toEqual([{ ...rows[0]!, jwk: "garbled" }, rows[1]!]);
      expect((await table.dates())[2]!.slice(0, 2)).toEqual([3, t0 + 2 * rotation]);
      expect(kids(idp, t0 + 10)).toEqual(kidsOf(all.slice(1)));
      const line = `"event":"key skipped","kid":"${rows[0]!.kid}"}`;
      await eventually("the log line", () => log.text().includes(line));
    },
  );

  scenario("the last row cannot be opened: it counts as a generation", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await table.change(garble(2));
    await idp.refresh(t0 + 10);
    expect((await table.dates()).map((dates) => dates.slice(0, 2))).toEqual([
      [1, t0],
      [2, t0 + rotation],
      [3, t0 + rotation],
    ]);
    expect(idp.signingKey(t0 + 10)!.kid).toBe(rows[0]!.kid);
    const [, , third] = await table.rows();
    expect(idp.signingKey(t0 + rotation)!.kid).toBe(third!.kid);
    // Opened again, the earlier generation goes first, for all instances alike.
    await table.change(`UPDATE signing_keys SET jwk = '${rows[1]!.jwk}' WHERE generation = 2`);
    await idp.refresh(t0 + 20);
    expect(idp.signingKey(t0 + rotation)!.kid).toBe(rows[1]!.kid);
  });

  for (const [what, jwk] of [
    ["no JSON", "{garbled"],
    ["no key", "{}"],
    ["a damaged key", JSON.stringify({ kty: "EC", crv: "P-256", x: "AA", y: "AA" })],
    ["sealed by another secret", "e30..AA.AA.AA"],
    ["nothing", ""],
  ] as const) {
    scenario(
      `the row that is due holds ${what}: the start fails, no row changes`,
      async (table) => {
        await begin(table);
        await table.change(`UPDATE signing_keys SET jwk = '${jwk}' WHERE generation = 1`);
        const rows = await table.rows();
        expect(await refused(boot(table))).toBe(unopened(rows[0]!));
        expect(await table.rows()).toEqual(rows);
      },
    );
  }

  scenario("the due row of a second algorithm cannot be opened: no row changes", async (table) => {
    await begin(table, { algorithms: ["ES256", "Ed25519"] });
    await table.change("DELETE FROM signing_keys WHERE alg = 'ES256' AND generation = 2");
    await table.change("UPDATE signing_keys SET jwk = '' WHERE alg = 'Ed25519' AND generation = 1");
    const rows = await table.rows();
    const due = rows.find(({ alg }) => alg === "Ed25519")!;
    const starting = boot(table, { algorithms: ["ES256", "Ed25519"] });
    expect(await refused(starting)).toBe(unopened(due));
    expect(await table.rows()).toEqual(rows);
  });

  scenario("rows before and after the due one cannot be opened: it starts", async (table) => {
    const { idp, rows, t0 } = await begin(table);
    await idp.refresh(t0 + rotation);
    await table.age(rotation + 10);
    await table.change(garble(1));
    await table.change(garble(3));
    const started = await boot(table);
    const now = secondsNow();
    expect(started.signingKey(now)!.kid).toBe(rows[1]!.kid);
    const all = await table.rows();
    expect(all.map(({ generation }) => generation)).toEqual([1, 2, 3, 4]);
    expect(all[3]!.signs_from).toBe(all[1]!.signs_until);
    expect(kids(started, now)).toEqual([rows[1]!.kid, all[3]!.kid]);
  });

  scenario("a row is due until just before signs_until", async (table) => {
    const { t0 } = await begin(table);
    const outcome = (after: number) =>
      withinOneSecond(async (now) => {
        await table.change("DELETE FROM signing_keys WHERE generation > 2");
        const columns = `signs_from = ${now + after} - ${rotation}, signs_until = ${now + after}`;
        await table.change(`UPDATE signing_keys SET jwk = '', ${columns} WHERE generation = 1`);
        return await refused(boot(table));
      });
    expect(t0).toBeGreaterThan(0);
    expect(await outcome(0)).toBe("started");
    expect(await outcome(1)).toBe(unopened((await table.rows())[0]!));
  });

  scenario("used jtis are swept 300 s after they expire", async (table) => {
    const { idp, t0 } = await begin(table);
    const rows = [t0 - 301, t0 - 300, t0 - 299, t0].map((expires_at) => ({
      id: `${expires_at - t0}`,
      expires_at,
    }));
    await table.sql`INSERT INTO used_jtis ${table.sql(rows)}`;
    await idp.refresh(t0);
    const left = await table.sql`SELECT id FROM used_jtis ORDER BY expires_at`;
    expect(left.map(({ id }: { id: string }) => id)).toEqual(["-300", "-299", "0"]);
  });

  scenario("instances that start or rotate together: one row per generation", async (table) => {
    const idps = await Promise.all([boot(table), boot(table), boot(table)]);
    const rows = await table.rows();
    const [first, second, ...rest] = await table.dates();
    expect([first![0], second![0], rest]).toEqual([1, 2, []]);
    expect(second![1]).toBe(first![2]!);
    for (const idp of idps) expect(kids(idp, first![1]!)).toEqual(kidsOf(rows));
    const at = first![2]!;
    await Promise.all(idps.map((idp, index) => idp.refresh(at + index)));
    expect((await table.dates()).map(([generation]) => generation)).toEqual([1, 2, 3]);
    const after = kidsOf(await table.rows());
    for (const idp of idps) expect(kids(idp, at)).toEqual(after);
  });

  scenario("a poll sees a deleted row", async (table) => {
    const idp = await boot(table, { pollSeconds: 0.02 });
    const rows = await table.rows();
    await table.change(remove(1));
    const now = secondsNow();
    await eventually("the successor signs", () => idp.signingKey(now)?.kid === rows[1]!.kid);
    await eventually("a third key", async () => (await table.rows()).length === 2);
    await eventually("all published", async () => {
      return Bun.deepEquals(kids(idp, now), kidsOf(await table.rows()));
    });
  });

  scenario("a poll that fails: degraded, logged; one that works: ok again", async (table) => {
    const origin = freeOrigin();
    const idp = await boot(table, { pollSeconds: 0.02 }, { origin });
    const rows = await table.rows();
    const health = async () => {
      const answer = await fetch(`${origin}/health`);
      return [answer.status, await answer.json(), answer.headers.get("cache-control")];
    };
    const ok = [200, { status: "ok" }, "no-store"];
    expect(await health()).toEqual(ok);
    const before = log.text().length;
    await table.change("ALTER TABLE signing_keys RENAME TO elsewhere");
    await eventually("degraded", async () => !Bun.deepEquals(await health(), ok));
    expect(await health()).toEqual([200, { status: "degraded" }, "no-store"]);
    expect(kids(idp, secondsNow())).toEqual(kidsOf(rows));
    await table.change("ALTER TABLE elsewhere RENAME TO signing_keys");
    await eventually("ok", async () => Bun.deepEquals(await health(), ok));
    const lines = () => log.text().slice(before);
    await eventually("both lines", () => lines().includes('"event":"database back"'));
    const reason = /"event":"database away","reason":"(no such table: signing_keys|relation)/;
    expect(lines()).toMatch(reason);
    // It comes back once: more polls, which sweep this, log no more.
    for (const id of ["a", "b", "c"]) {
      await table.change(`INSERT INTO used_jtis VALUES ('${id}', 0)`);
      await eventually(
        "swept",
        async () => (await table.sql`SELECT * FROM used_jtis`).length === 0,
      );
    }
    await fetch(`${origin}/connect/token`, { method: "POST" });
    await eventually("a later line", () => lines().includes('"event":"token refused"'));
    expect(lines().split('"database back"')).toHaveLength(2);
  });

  scenario("without a key: no token, not healthy, nothing published", async (table) => {
    const origin = freeOrigin();
    const idp = await boot(table, {}, { origin });
    const request = () => {
      const body = "grant_type=client_credentials&client_id=client&client_secret=secret";
      const headers = { "content-type": "application/x-www-form-urlencoded" };
      return fetch(`${origin}/connect/token`, { method: "POST", headers, body });
    };
    expect((await request()).status).toBe(200);
    await table.change("DELETE FROM signing_keys; ALTER TABLE signing_keys DROP COLUMN kid");
    expect(await refused(idp.refresh())).toMatch(/column/);
    const health = await fetch(`${origin}/health`);
    expect([health.status, await health.json()]).toEqual([503, { status: "unavailable" }]);
    const refusal = await request();
    expect([refusal.status, refusal.headers.get("retry-after")]).toEqual([503, "5"]);
    expect(await refusal.json()).toMatchObject({ error: "temporarily_unavailable" });
    expect(idp.publicKeys(0)).toEqual([]);
    await table.change("ALTER TABLE signing_keys ADD COLUMN kid TEXT");
    await idp.refresh();
    expect((await request()).status).toBe(200);
  });

  // --- The key encryption secret -----------------------------------------------------------------

  scenario("without a secret the rows are private JWKs", async (table) => {
    const { rows } = await begin(table);
    for (const { jwk, kid, alg } of rows) {
      const members = JSON.parse(jwk);
      expect(Object.keys(members).sort()).toEqual(["crv", "d", "kty", "x", "y"]);
      expect([kid, alg]).toEqual([thumbprint(members), "ES256"]);
    }
  });

  scenario("with a secret they are JWEs, dir and A256GCM", async (table) => {
    const secret = newSecret();
    const { idp, rows, t0 } = await begin(table, {}, secret);
    for (const { jwk, kid } of rows) {
      const [header, encryptedKey, ...rest] = jwk.split(".");
      expect(JSON.parse(`${Buffer.from(header!, "base64url")}`)).toEqual({
        alg: "dir",
        enc: "A256GCM",
      });
      expect([encryptedKey, rest.length]).toEqual(["", 3]);
      const opened = await jose.compactDecrypt(jwk, Buffer.from(secret, "base64url"));
      const members = JSON.parse(new TextDecoder().decode(opened.plaintext));
      expect(Object.keys(members).sort()).toEqual(["crv", "d", "kty", "x", "y"]);
      expect(thumbprint(members)).toBe(kid);
    }
    const again = await boot(table, {}, { secret });
    expect(await table.rows()).toEqual(rows);
    expect(again.signingKey(t0)!.kid).toBe(idp.signingKey(t0)!.kid);
  });

  const isClear = ({ jwk }: Row) => jwk.startsWith("{");
  const opens = async (secret: string, { jwk }: Row) =>
    await jose.compactDecrypt(jwk, Buffer.from(secret, "base64url")).then(
      () => true,
      () => false,
    );

  scenario(
    "sealed rows, with another secret, none, or `none`: no start, no change",
    async (table) => {
      const { rows } = await begin(table, {}, newSecret());
      for (const secret of [newSecret(), "", "none", `${newSecret()},none`]) {
        expect(await refused(boot(table, {}, { secret }))).toBe(unopened(rows[0]!));
        expect(await table.rows()).toEqual(rows);
      }
    },
  );

  scenario("from clear to sealed: `new,none`, later `new`", async (table) => {
    const { idp: clear, rows, t0 } = await begin(table);
    const secret = newSecret();
    expect(await refused(boot(table, {}, { secret }))).toBe(unopened(rows[0]!));
    expect(await table.rows()).toEqual(rows);
    for (const words of [`${secret},none`, `none,${secret}`, `${secret},none,`]) {
      const both = await boot(table, {}, { secret: words });
      expect(await table.rows()).toEqual(rows);
      expect(kids(both, t0)).toEqual(kids(clear, t0));
      expect(both.signingKey(t0)!.kid).toBe(rows[0]!.kid);
    }
    const both = await boot(table, {}, { secret: `${secret},none` });
    for (const at of [t0 + rotation, t0 + 2 * rotation]) await both.refresh(at);
    expect((await table.rows()).map(isClear)).toEqual([true, false, false]);
    await both.refresh(t0 + 2 * rotation + 2 * retention + 1);
    const sealed = await table.rows();
    expect(sealed.map(isClear)).toEqual([false, false]);
    const alone = await boot(table, {}, { secret });
    expect(kids(alone, t0)).toEqual(kidsOf(sealed));
    expect(await table.rows()).toEqual(sealed);
  });

  scenario("a row in clear that is planted later is passed over without `none`", async (table) => {
    const { idp, rows, t0 } = await begin(table, {}, newSecret());
    const planted = await jose.exportJWK(
      (await jose.generateKeyPair("ES256", { extractable: true })).privateKey,
    );
    const row = { ...rows[0]!, generation: 9, kid: "planted", jwk: JSON.stringify(planted) };
    await table.sql`INSERT INTO signing_keys ${table.sql({ ...row, signs_from: t0 - 9 })}`;
    await idp.refresh(t0);
    expect(kids(idp, t0)).toEqual(kidsOf(rows));
    expect(idp.signingKey(t0)!.kid).toBe(rows[0]!.kid);
  });

  scenario("from old to new secret, two instances one after the other", async (table) => {
    const [old, fresh] = [newSecret(), newSecret()];
    const { idp, rows, t0 } = await begin(table, {}, old);
    let [a, b] = [idp, await boot(table, {}, { secret: old })];
    let at = t0;
    /** After one more rotation both know every key and sign with the same. */
    const agree = async (sealedBy: string) => {
      at += rotation;
      for (const one of [b, a, b]) await one.refresh(at);
      const all = await table.rows();
      expect(await opens(sealedBy, all.at(-1)!)).toBe(true);
      expect(all.filter(({ removed_at }) => removed_at > at).map(({ kid }) => kid)).toEqual(
        kids(a, at),
      );
      expect(kids(a, at)).toEqual(kids(b, at));
      expect(a.signingKey(at)!.kid).toBe(b.signingKey(at)!.kid);
    };
    await agree(old);
    const signing = async () => (await table.rows()).find(({ signs_until }) => signs_until > t0)!;
    expect(await refused(boot(table, {}, { secret: fresh }))).toBe(unopened(await signing()));
    b = await boot(table, {}, { secret: `${old},${fresh}` });
    await agree(old);
    a = await boot(table, {}, { secret: `${old},${fresh}` });
    await agree(old);
    b = await boot(table, {}, { secret: `${fresh},${old}` });
    await agree(fresh);
    a = await boot(table, {}, { secret: `${fresh},${old}` });
    await agree(fresh);
    const before = await table.rows();
    expect(await refused(boot(table, {}, { secret: fresh }))).toBe(unopened(await signing()));
    expect(await table.rows()).toEqual(before);
    for (let left = 3; left > 0; left--) await agree(fresh);
    await a.refresh(at + 2 * retention + 1);
    b = await boot(table, {}, { secret: fresh });
    await agree(fresh);
    a = await boot(table, {}, { secret: fresh });
    await agree(fresh);
    expect(kidsOf(await table.rows())).not.toContain(rows[1]!.kid);
  });
}

// --- Public keys ---------------------------------------------------------------------------------

const members = [
  ["ES384", "crv kty x y"],
  ["ES512", "crv kty x y"],
  ["RS256", "e kty n"],
  ["PS256", "e kty n"],
  ["EdDSA", "crv kty x"],
  ["Ed25519", "crv kty x"],
  ["ML-DSA-65", "kty pub"],
  ["ML-DSA-87", "kty pub"],
  ["ES256", "crv kty x y"],
] as const;

test("signing keys: GET jwks publishes the public members of each type, and no other", async () => {
  const table = sqlite();
  const origin = freeOrigin();
  const algorithms = members.map(([alg]) => alg);
  await boot(table, { algorithms }, { origin });
  const rows = await table.rows();
  await table.close();
  const answer = await fetch(`${origin}/.well-known/openid-configuration/jwks`);
  expect(answer.status).toBe(200);
  const { keys } = (await answer.json()) as { keys: jose.JWK[] };
  expect(keys).toHaveLength(2 * members.length);
  for (const [alg, names] of members) {
    const own = keys.filter((jwk) => jwk.alg === alg);
    expect(own.map(({ kid }) => kid)).toEqual(kidsOf(rows.filter((row) => row.alg === alg)));
    for (const { kid, use, alg: _, ...jwk } of own) {
      expect(Object.keys(jwk).sort().join(" ")).toBe(names);
      const row = rows.find((one) => one.kid === kid)!;
      expect(JSON.parse(row.jwk)).toMatchObject(jwk);
      expect([use, kid]).toEqual(["sig", await jose.calculateJwkThumbprint({ ...jwk, alg })]);
    }
  }
});

test("signing keys: a member that is not known to be public is not published", async () => {
  const table = sqlite();
  const idp = await boot(table);
  const [row] = await table.rows();
  const jwk = JSON.stringify({ ...JSON.parse(row!.jwk), note: "mine", oth: [], key_ops: ["sign"] });
  await table.change(`UPDATE signing_keys SET jwk = '${jwk}' WHERE generation = 1`);
  await idp.refresh();
  await table.close();
  const [published] = idp.publicKeys(0);
  expect(Object.keys(published!).sort()).toEqual("alg crv kid kty use x y".split(" "));
});

// --- SQLite --------------------------------------------------------------------------------------

const mode = (path: string) => (statSync(path).mode & 0o7777).toString(8);

for (const prefix of ["sqlite://", "sqlite:"]) {
  test(`SQLite: ${prefix} directory 0700, files 0600, WAL, emptied after an insert`, async () => {
    const directory = join(temporaryDirectory(), "new/keys");
    const umask = process.umask(0);
    const table = new Table(`${prefix}${directory}/keys.db`);
    try {
      const prepare = spyOn(Database.prototype, "prepare");
      await boot(table);
      // The server's own connection tells how it is set.
      const connection = prepare.mock.contexts[0] as Database;
      prepare.mockRestore();
      const setting = (name: string) => Object.values(connection.query(`PRAGMA ${name}`).get()!);
      expect(setting("busy_timeout")).toEqual([100]);
      expect(setting("journal_mode")).toEqual(["wal"]);
      expect(setting("synchronous")).toEqual([1]); // NORMAL
    } finally {
      process.umask(umask);
    }
    expect([mode(dirname(directory)), mode(directory)]).toEqual(["700", "700"]);
    expect(readdirSync(directory).sort()).toEqual(["keys.db", "keys.db-shm", "keys.db-wal"]);
    for (const name of readdirSync(directory)) expect(mode(join(directory, name))).toBe("600");
    expect(statSync(join(directory, "keys.db-wal")).size).toBe(0);
    expect(statSync(join(directory, "keys.db")).size).toBeGreaterThan(0);
    await table.close();
  });
}

test("SQLite: a question mark ends the name of the file", async () => {
  const file = join(temporaryDirectory(), "keys.db");
  const table = new Table(`sqlite://${file}?mode=rwc`);
  await boot(table);
  expect(mode(file)).toBe("600");
  expect(await table.rows()).toHaveLength(2);
  await table.close();
});

test("SQLite: the tables", async () => {
  const table = sqlite();
  await boot(table);
  const columns = async (name: string) =>
    (await table.sql.unsafe(`PRAGMA table_info(${name})`)).map(
      (column: Record<string, unknown>) =>
        `${column["name"]} ${column["type"]} ${column["notnull"]} ${column["pk"]}`,
    );
  expect(await columns("signing_keys")).toEqual([
    ...["alg TEXT 0 1", "generation BIGINT 0 2", "kid TEXT 1 0", "jwk TEXT 1 0"],
    ...["signs_from BIGINT 1 0", "signs_until BIGINT 1 0", "removed_at BIGINT 1 0"],
  ]);
  expect(await columns("used_jtis")).toEqual(["id TEXT 0 1", "expires_at BIGINT 1 0"]);
  const names = await table.sql`SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE INDEX%'`;
  expect(names.map(({ name }: { name: string }) => name)).toEqual(["used_jtis_expires_at"]);
  await table.close();
});

// --- Starts that fail ----------------------------------------------------------------------------

/** The one line that a start ends with; nothing goes to stdout, and the exit code is 1. */
async function failedStart(
  env: Record<string, string> = {},
  cwd = temporaryDirectory(),
  wrapper: string[] = [],
): Promise<string> {
  const { PATH, HOME } = process.env;
  const program = new Program([...wrapper, process.execPath, join(root, "idp.ts")], {
    cwd,
    env: { PATH, HOME, ISSUER: freeOrigin(), ...env },
  });
  expect(await program.ended()).toBe(1);
  expect([program.stdout, program.stderr]).toEqual(["", expect.stringMatching(/^error: .+\n$/)]);
  return program.stderr.slice("error: ".length, -1);
}

const title = (engine: string, what: string) => `a start that fails, ${engine}: ${what}`;

for (const { engine, make } of engines) {
  for (const [what, secret, other] of [
    ["sealed rows, another secret", newSecret(), newSecret()],
    ["sealed rows, no secret", newSecret(), ""],
    ["rows in clear, a secret without `none`", "", newSecret()],
  ] as const) {
    test.concurrent(title(engine, `${what} → one line, code 1, no row changed`), async () => {
      const table = await make();
      await boot(table, {}, { secret });
      const rows = await table.rows();
      const said = await failedStart({ DATABASE_URL: table.url, KEY_ENCRYPTION_SECRET: other });
      expect(said).toBe(unopened(rows[0]!));
      expect(await table.rows()).toEqual(rows);
      await table.close();
    });
  }
}

/** A directory with the files of a database in which a key has to be made at the next start. */
async function agedDatabase(): Promise<{ directory: string; file: string; rows: Row[] }> {
  const directory = temporaryDirectory();
  const file = join(directory, "keys/keys.db");
  const table = new Table(`sqlite://${join(temporaryDirectory(), "keys.db")}`);
  await boot(table);
  await table.age(rotation + day);
  const rows = await table.rows();
  mkdirSync(dirname(file));
  await table.change(`VACUUM INTO '${file}'`);
  const copy = new Table(`sqlite://${file}`);
  await copy.change("PRAGMA journal_mode = WAL");
  await copy.close();
  await table.close();
  return { directory, file, rows };
}

test.concurrent(title("SQLite", "not a database → one line, the file is as before"), async () => {
  const directory = temporaryDirectory();
  mkdirSync(join(directory, "keys"));
  const file = join(directory, "keys/keys.db");
  const content = "This is no database. ".repeat(500);
  writeFileSync(file, content);
  const said = await failedStart({}, directory);
  expect(said).toBe("Cannot use the database: file is not a database");
  expect(readFileSync(file, "utf8")).toBe(content);
  expect(readdirSync(dirname(file))).toEqual(["keys.db"]);
});

test.concurrent(title("SQLite", "damaged → one line, the file is as before"), async () => {
  const { directory, file } = await agedDatabase();
  const content = readFileSync(file);
  expect(content.fill(255, 4_096).length).toBeGreaterThan(8_192);
  writeFileSync(file, content);
  const said = await failedStart({}, directory);
  expect(said).toBe("Cannot use the database: database disk image is malformed");
  expect(
    readFileSync(file)
      .subarray(4_096)
      .every((byte) => byte === 255),
  ).toBe(true);
});

test.concurrent(title("SQLite", "keys is a file → one line, the file is as before"), async () => {
  const directory = temporaryDirectory();
  writeFileSync(join(directory, "keys"), "mine");
  const said = await failedStart({}, directory);
  expect(said).toBe("Cannot use the database: EEXIST: file already exists, mkdir 'keys'");
  expect(readFileSync(join(directory, "keys"), "utf8")).toBe("mine");
});

test.concurrent(title("SQLite", "the file is a directory → one line"), async () => {
  const directory = temporaryDirectory();
  mkdirSync(join(directory, "keys/keys.db"), { recursive: true });
  const said = await failedStart({}, directory);
  const path = "'keys/keys.db'";
  expect(said).toBe(
    `Cannot use the database: EISDIR: illegal operation on a directory, open ${path}`,
  );
});

// For root no mode forbids anything, unless it gives up the capability that lifts them.
const obedient = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];

test.concurrent(title("SQLite", "a directory that forbids writing → one line"), async () => {
  const directory = temporaryDirectory();
  chmodSync(directory, 0o555);
  const said = await failedStart({}, directory, process.getuid?.() === 0 ? obedient : []);
  expect(said).toBe("Cannot use the database: EACCES: permission denied, mkdir 'keys'");
  expect(readdirSync(directory)).toEqual([]);
});

test.concurrent(title("SQLite", "a database that forbids writing → one line"), async () => {
  const { directory, file } = await agedDatabase();
  const content = readFileSync(file);
  chmodSync(file, 0o400);
  const said = await failedStart({}, directory, process.getuid?.() === 0 ? obedient : []);
  expect(said).toBe("Cannot use the database: EACCES: permission denied, open 'keys/keys.db'");
  expect(readFileSync(file)).toEqual(content);
});

const canMount = Bun.spawnSync(["unshare", "--mount", "true"]).success;
const diskTitle = (kilobytes: number) =>
  `${canMount ? "" : "needs the right to mount: "}the disk has ${kilobytes} kB left → one line, no row lost`;

for (const kilobytes of [0, 36]) {
  test.concurrent.skipIf(!canMount)(title("SQLite", diskTitle(kilobytes)), async () => {
    const { directory, rows } = await agedDatabase();
    mkdirSync(join(directory, "disk"));
    // A disk of its own, which is gone with the last process that can see it.
    const script = `mount -t tmpfs -o size=256k none disk && cp -r keys disk && cd disk &&
      { cat /dev/zero > filler; truncate --size=-${kilobytes}K filler; } 2> /dev/null
      "$@"; code=$?; rm filler && cp -r keys ../after && exit $code`;
    const wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"];
    const said = await failedStart({}, directory, wrapper);
    expect(said).toMatch(/^Cannot use the database: (disk I\/O error|database or disk is full)$/);
    const after = new Table(`sqlite://${join(directory, "after/keys.db")}`);
    expect(await after.rows()).toEqual(rows);
    // With space again it goes on where it was.
    await boot(after);
    expect((await after.rows()).slice(0, 2)).toEqual(rows);
    expect(await after.rows()).toHaveLength(3);
    await after.close();
  });
}

test.concurrent(title("PostgreSQL", "nobody listens → one line"), async () => {
  const database = `postgres://postgres:hidden@127.0.0.1:${freePort()}/postgres`;
  const said = await failedStart({ DATABASE_URL: database });
  expect(said).toStartWith("Cannot use the database: ");
  expect(said).not.toContain("hidden");
});

if (postgresUrl) {
  test.concurrent(title("PostgreSQL", "a database that is not there → one line"), async () => {
    const url = new URL(postgresUrl!);
    url.pathname = "/not_there";
    const said = await failedStart({ DATABASE_URL: url.href });
    expect(said).toBe('Cannot use the database: database "not_there" does not exist');
  });
}
