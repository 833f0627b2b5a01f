/**
 * The life of a signing key, seen by clients and by an operator who looks into the table. Time is a
 * variable here; an instance polls every few milliseconds only where a test says so.
 */

import { expect, setDefaultTimeout, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import * as jose from "jose";
import { authorizationServer, type AuthorizationServerSettings } from "../../config.ts";
import { engines, eventually, type Row, sqlite, Table } from "../support/databases.ts";
import { basic, post, refusalOf, send } from "../support/http.ts";
import { assertion, assertionType, key, proof } from "../support/jwt.ts";
import { temporaryDirectory } from "../support/programs.ts";
import { idp } from "../support/servers.ts";

setDefaultTimeout(30_000);

const day = 86_400;
/** A time so long after every test began; nothing here looks at the clock on the wall. */
const after = (days: number, seconds = 0) => 2_000_000_000 + days * day + seconds;
const lifetimes = { rotationSeconds: 90 * day, retentionSeconds: 14 * day };
const robot = await key();
const clients = [{ ...authorizationServer.clients[0]!, jwks: { keys: [robot.publicJwk] } }];
const grant = { grant_type: "client_credentials" };

// --- Instances -----------------------------------------------------------------------------------

interface Options {
  at?: number;
  secret?: string;
  keys?: Partial<AuthorizationServerSettings["signingKeys"]>;
  /** Whether it reads the table every few milliseconds, or at its start alone. */
  polls?: boolean;
}

/** Starts an authorization server on a table, with a clock of its own. */
async function start(table: Table, options: Options = {}) {
  const { at = after(0), secret: keyEncryptionSecret = "", keys = {}, polls = false } = options;
  const clock = { now: at };
  const pollSeconds = polls ? 0.01 : 900;
  const running = await idp({
    ...{ databaseUrl: table.url, databaseWaitSeconds: 0, keyEncryptionSecret, clients },
    signingKeys: { ...authorizationServer.signingKeys, ...lifetimes, pollSeconds, ...keys },
    clock: () => clock.now * 1000,
  });
  table.users.push(running);
  const token = (headers: Record<string, string> = {}) =>
    post(running.tokenEndpoint, grant, { authorization: basic("client", "secret"), ...headers });
  /** A token request with an assertion, which may be used once. */
  const once = async (jti: string = crypto.randomUUID()) => {
    const claims = { iat: clock.now, exp: clock.now + 60, jti };
    const client_assertion = await assertion(robot, "client", running.url, claims);
    const credentials = { client_assertion, client_assertion_type: assertionType };
    return await post(running.tokenEndpoint, { ...grant, ...credentials });
  };
  /** The kid of the key that signs. */
  const signs = async (): Promise<string | undefined> => {
    const { access_token } = (await token()).json;
    return access_token && jose.decodeProtectedHeader(access_token).kid;
  };
  const jwks = async (): Promise<jose.JWK[]> => {
    const answer = await send(`${running.url}/.well-known/openid-configuration/jwks`);
    return answer.status === 503 ? [] : answer.json.keys;
  };
  const publishes = async () => (await jwks()).map(({ kid }) => kid!).toSorted();
  /** The generation of the key that signs, and of those that are public, as "1 of 1,2". */
  const shows = async (now = clock.now) => {
    clock.now = now;
    const rows = await table.rows();
    const generation = (kid?: string) => rows.find((row) => row.kid === kid)?.generation ?? "none";
    return `${generation(await signs())} of ${(await publishes()).map(generation).toSorted()}`;
  };
  const health = async () => {
    const { status, json } = await send(`${running.url}/health`);
    return `${status} ${json.status}`;
  };
  /** Moves the clock on, and waits until a poll has deleted a row that is due only since then. */
  const poll = async (now = clock.now + 1) => {
    const id = `mark ${crypto.randomUUID()}`;
    await table.change(`INSERT INTO used_jtis VALUES ('${id}', ${now - 30 * day - 1})`);
    clock.now = now;
    const isGone = async () => (await table.identifiers(id)).length === 0;
    await eventually("a poll has swept", isGone);
  };
  /** The kids that the log names in lines about such an event. */
  const logged = (name: string): string[] =>
    running.lines.filter(({ event }) => event === name).map(({ kid }) => kid);
  return { running, clock, token, once, signs, jwks, publishes, shows, health, poll, logged };
}

/** What a start says that fails. */
const refusal = (table: Table, options: Options = {}): Promise<string> =>
  start(table, options).then(
    () => "it started",
    (error: Error) => error.message,
  );

/** A first instance, and the two rows that it made. */
async function begin(table: Table, options: Options = {}) {
  const instance = await start(table, options);
  const rows = await table.rows();
  const [first, second] = rows as [Row, Row];
  return { ...instance, instance, rows, first, second };
}

// --- Rows ----------------------------------------------------------------------------------------

const kids = (rows: Row[]) => rows.map(({ kid }) => kid).toSorted();
const generations = (rows: Row[]) => rows.map(({ generation }) => generation).join();
const onDay = (seconds: number) => (seconds - after(0)) / day;
/** The generation of each row, and between which days it signs, as "1: 0-90, 2: 90-180". */
const periods = (rows: Row[]) =>
  rows
    .map((row) => `${row.generation}: ${onDay(row.signs_from)}-${onDay(row.signs_until)}`)
    .join(", ");
const change = (generation: number, assignment: string) =>
  `UPDATE signing_keys SET ${assignment} WHERE generation = ${generation}`;
const remove = (generation: number) => `DELETE FROM signing_keys WHERE generation = ${generation}`;

const newSecret = () => randomBytes(32).toString("base64url");
const secret = newSecret();
const isClear = ({ jwk }: Row) => jwk.startsWith("{");
/** The text of a sealed JWK, or undefined where the secret does not open it. */
const unseal = ({ jwk }: Row, words = secret): Promise<string | undefined> =>
  jose.compactDecrypt(jwk, Buffer.from(words, "base64url")).then(
    ({ plaintext }) => new TextDecoder().decode(plaintext),
    () => undefined,
  );

const firstPeriod = `signs_from = ${after(0)}, signs_until = ${after(90)}`;
/** What is done to the table on which day, and what shows then. */
const touches: [what: string, day: number, statement: string, shown: string][] = [
  ["the row that signs is deleted", 0, remove(1), "2 of 2,3"],
  ["the row of the successor is deleted", 0, remove(2), "1 of 1,2"],
  ["the row of one that has signed is deleted", 90, remove(1), "2 of 2,3"],
  ["all rows are deleted", 0, "DELETE FROM signing_keys", "1 of 1,2"],
  ["the successor overlaps", 0, change(2, "signs_from = signs_from - 1"), "1 of 1,2,3"],
  ["both have one period", 0, change(2, firstPeriod), "1 of 1,2,3"],
  ["generations are out of order", 0, change(1, "generation = 9"), "9 of 2,9"],
];

/** A key that nobody here made, with members that are not known to be public. */
const foreign = JSON.stringify({ ...robot.privateJwk, note: "mine", oth: [], ext: true });
/** What becomes of the first row; the secret of the instance; what its log says of the row. */
type Damage = [what: string, secret: string, assignment: (second: Row) => string, reason: string];
const damages: Damage[] = [
  ["holds no JSON", "", () => "jwk = '{garbled'", ""],
  ["holds no key", "", () => "jwk = '{}'", ""],
  ["holds another key", "", () => `jwk = '${foreign}'`, "kid"],
  ["holds what somebody sealed", "", () => "jwk = 'e30..AA.AA.AA'", "opens"],
  ["has a kid that is not its thumbprint", "", () => "kid = 'another'", "kid"],
  ["is removed before it stops to sign", "", () => "removed_at = signs_until - 1", "dates"],
  ["begins when it is over", "", () => "signs_from = signs_until", "dates"],
  ["was sealed, and signs longer", secret, () => "signs_until = signs_until + 9", "dates"],
  ["was sealed, and signs earlier", secret, () => "signs_from = signs_from - 9", "dates"],
  ["was sealed, and is public longer", secret, () => "removed_at = removed_at + 9", "dates"],
  ["was sealed, and has another kid", secret, () => "kid = 'another'", "kid"],
  ["was sealed, and holds another", secret, ({ jwk }) => `jwk = '${jwk}'`, "kid"],
  ["was sealed, and is another", secret, ({ jwk, kid }) => `jwk = '${jwk}', kid = '${kid}'`, ""],
  ["is in clear, though others are sealed", secret, () => `jwk = '${foreign}'`, "none"],
];

for (const { engine, make, isMissing } of engines) {
  const scenario = (name: string, run: (table: Table) => Promise<void>) =>
    test.skipIf(isMissing)(`signing keys, ${engine}: ${name}`, async () => {
      const table = await make();
      await run(table).finally(() => table.close());
    });

  // --- Life --------------------------------------------------------------------------------------

  scenario("the first start makes two, which sign one after the other", async (table) => {
    const { token, health, shows, logged, rows } = await begin(table);
    expect(periods(rows)).toBe("1: 0-90, 2: 90-180");
    for (const { signs_until, removed_at } of rows) expect(removed_at - signs_until).toBe(14 * day);
    expect(logged("key made").toSorted()).toEqual(kids(rows));
    for (const [days, before, then] of [
      [90, "1 of 1,2", "2 of 1,2"],
      [104, "2 of 1,2", "2 of 2"],
      [180, "2 of 2", "none of 2"],
      [194, "none of 2", "none of "],
    ] as const)
      expect([await shows(after(days, -1)), await shows(after(days))]).toEqual([before, then]);
    expect(refusalOf(await token())).toBe("503 temporarily_unavailable");
    expect(await health()).toBe("503 unavailable");
    expect((await start(table)).logged("key made")).toEqual([]);
    expect(await table.rows()).toEqual(rows);
  });

  scenario("three rotations: one signs, one follows, those of old tokens stay", async (table) => {
    const { poll, shows, logged, rows } = await begin(table, { polls: true });
    for (const turn of [1, 2, 3]) {
      await poll(after(90 * turn, -1));
      expect(await table.rows()).toEqual(rows);
      expect(await shows()).toBe(`${turn} of ${turn},${turn + 1}`);
      await poll(after(90 * turn));
      rows.push((await table.rows()).at(-1)!);
      expect(await table.rows()).toEqual(rows);
      expect(await shows()).toBe(`${turn + 1} of ${turn},${turn + 1},${turn + 2}`);
      // The old key is deleted a quarter of an hour after it was published last.
      await poll(after(90 * turn + 14, 899));
      expect(await table.rows()).toEqual(rows);
      const { kid } = rows.shift()!;
      await poll(after(90 * turn + 14, 900));
      expect(await table.rows()).toEqual(rows);
      await poll();
      expect(logged("key removed").slice(turn - 1)).toEqual([kid]);
    }
    expect(periods(rows)).toBe("4: 270-360, 5: 360-450");
    expect(logged("key skipped")).toEqual([]);
  });

  scenario("only polls that are at most 900 s apart delete what ended meanwhile", async (table) => {
    const { poll, rows } = await begin(table, { polls: true });
    for (const at of [after(104, 850), after(104, 850 + 901), after(194, 850)]) await poll(at);
    for (const at of [after(104, 900), after(3000)]) await start(table, { at });
    const all = await table.rows();
    expect(all.slice(0, 2)).toEqual(rows);
    // Where the clock is right, nothing has happened, but that there are more keys.
    expect(await (await start(table)).shows()).toBe(`1 of ${generations(all)}`);
    await poll(after(194, 850 + 900));
    expect(generations(await table.rows())).toBe(generations(all).replace(",2", ""));
  });

  scenario("a clock that was ten years ahead for a while ends no rotation", async (table) => {
    const { poll } = await begin(table, { polls: true });
    for (const days of [3_650, 0, 91]) await poll(after(days));
    expect(periods(await table.rows())).toContain(": 180-270");
  });

  for (const polls of [true, false])
    scenario(`off for two rotations, ${polls ? "asleep" : "stopped"}: a new one`, async (table) => {
      const { instance, poll } = await begin(table, { polls });
      const back = async (at: number) => {
        if (polls) await poll(at);
        return polls ? instance : await start(table, { at });
      };
      expect(await (await back(after(180, -1))).shows()).toBe("2 of 2,3");
      expect(periods(await table.rows())).toEndWith(", 3: 180-270");
      await table.change(remove(3));
      expect(await (await back(after(180))).shows()).toBe("3 of 2,3,4"); // 2 for its last tokens
      expect(periods(await table.rows())).toEndWith(", 3: 180-270, 4: 270-360");
      expect(await (await back(after(810))).shows()).toBe("5 of 5,6");
      expect(periods(await table.rows())).toEndWith(", 5: 810-900, 6: 900-990");
    });

  scenario("clocks some seconds apart: the same keys, public before they sign", async (table) => {
    const { instance: right, rows } = await begin(table, { polls: true });
    const early = await start(table, { at: after(0, -5) }); // the first has not begun by its clock
    expect(await early.shows()).toBe("1 of 1,2");
    expect(await table.rows()).toEqual(rows);
    const rotating = [2, 3, 4].map((seconds) => start(table, { at: after(90, seconds) }));
    const ahead = await Promise.all(rotating);
    await right.poll(after(90, -3));
    const behind = await start(table, { at: after(90, -8) });
    expect(periods(await table.rows())).toBe("1: 0-90, 2: 90-180, 3: 180-270");
    expect(ahead.flatMap(({ logged }) => logged("key made"))).toHaveLength(1);
    for (const { shows } of ahead) expect(await shows()).toBe("2 of 1,2,3");
    for (const { shows } of [right, behind]) expect(await shows()).toBe("1 of 1,2,3");
  });

  scenario("a second algorithm: it follows, then signs, then is alone", async (table) => {
    const { instance: old, first } = await begin(table, { polls: true });
    const of = async (alg: string) => (await table.rows()).filter((row) => row.alg === alg);
    const more = await start(table, { keys: { algorithms: ["ES256", "Ed25519"] }, polls: true });
    // An instance that does not know the algorithm yet publishes its keys all the same.
    await old.poll();
    expect(await table.rows()).toHaveLength(4);
    for (const { publishes } of [old, more])
      expect(await publishes()).toEqual(kids(await table.rows()));
    expect(await more.signs()).toBe(first.kid);
    await old.running.stop();
    await more.poll(after(90));
    for (const alg of ["ES256", "Ed25519"])
      expect(periods(await of(alg))).toBe("1: 0-90, 2: 90-180, 3: 180-270");
    const [, signing] = (await of("Ed25519")) as [Row, Row];
    const keys = { algorithms: ["Ed25519", "ES256"] };
    expect(await (await start(table, { keys, at: after(90) })).signs()).toBe(signing.kid);
    const alone = await start(table, { keys: { algorithms: ["Ed25519"] }, at: after(104, -1) });
    const published = async () => (await alone.jwks()).filter(({ alg }) => alg === "ES256").length;
    expect([await alone.signs(), await published()]).toEqual([signing.kid, 3]);
    alone.clock.now = after(104);
    expect([await published(), (await of("ES256")).length]).toEqual([2, 3]);
  });

  scenario("another rotation and retention: no key gets other dates", async (table) => {
    const { rows } = await begin(table);
    const keys = { rotationSeconds: 70 * day, retentionSeconds: 20 * day };
    const { poll } = await start(table, { keys, polls: true });
    await poll(after(90, -1));
    expect(await table.rows()).toEqual(rows);
    await poll(after(90));
    const [first, second, made] = (await table.rows()) as [Row, Row, Row];
    expect([first, second]).toEqual(rows);
    expect([periods([made]), made.removed_at]).toEqual(["3: 180-250", after(270)]);
  });

  // --- Rows that somebody else touches -----------------------------------------------------------

  for (const [what, days, statement, shown] of touches)
    scenario(`${what}: ${shown}`, async (table) => {
      const { poll, shows, logged } = await begin(table, { polls: true });
      await poll(after(days));
      const before = await table.rows();
      await table.change(statement);
      await poll();
      const rows = await table.rows();
      expect(await shows()).toBe(shown);
      expect(shown).toEndWith(` of ${generations(rows)}`);
      const gone = kids(before).filter((kid) => !kids(rows).includes(kid));
      expect(logged("key removed").toSorted()).toEqual(gone);
      // One that was made follows another.
      const made = rows.at(-1)!;
      const ends = rows.map(({ signs_until }) => signs_until);
      if (!kids(before).includes(made.kid)) expect(ends).toContain(made.signs_from);
      await poll();
      expect(await table.rows()).toEqual(rows);
    });

  // How a row is opened has nothing to do with the engine.
  for (const [what, words, assignment, why] of engine === "SQLite" ? damages : damages.slice(0, 1))
    scenario(`a row ${what}: it is reported and passed over, at a start fatal`, async (table) => {
      const { instance, first, second } = await begin(table, { secret: words, polls: true });
      await table.change(change(1, assignment(second)));
      const [damaged] = (await table.rows()) as [Row];
      const said = await refusal(table, { secret: words });
      expect(said).toStartWith(`The signing key ${damaged.kid} cannot be opened. KEY_ENC`);
      await instance.poll();
      expect(await instance.signs()).toBe(second.kid);
      const rows = await table.rows();
      expect(rows.slice(0, 2)).toEqual([damaged, second]);
      expect(periods(rows.slice(2))).toBe("3: 180-270");
      expect(await instance.publishes()).toEqual(kids(rows.slice(1)));
      const reason = expect.stringContaining(why);
      const line = { event: "key skipped", kid: damaged.kid, reason };
      expect(instance.running.lines).toContainEqual(expect.objectContaining(line));
      await table.change(remove(1));
      await table.sql`INSERT INTO signing_keys ${table.sql(first)}`;
      await instance.poll();
      expect(await instance.shows()).toBe("1 of 1,2,3");
    });

  scenario("a start is refused for a row of any algorithm, until it is over", async (table) => {
    const keys = { algorithms: ["Ed25519", "ES256"] };
    await begin(table, { keys });
    await table.change(`${change(1, "jwk = ''")} AND alg = 'ES256'`);
    await table.change(`${remove(2)} AND alg = 'Ed25519'`); // nor is one made that is missing
    const [unusable, ...others] = (await table.rows()) as [Row, ...Row[]];
    expect(await refusal(table, { keys, at: after(90, -1) })).toContain(unusable.kid);
    expect(await table.rows()).toEqual([unusable, ...others]);
    expect(await refusal(table, { keys: { algorithms: ["Ed25519"] } })).toBe("it started");
    expect(await refusal(table, { at: after(90) })).toBe("it started");
    await table.change("UPDATE signing_keys SET jwk = '' WHERE generation <> 2");
    const { signs } = await start(table, { at: after(90) });
    expect(await signs()).toBe(others[0]!.kid);
    const es256 = (await table.rows()).filter(({ alg }) => alg === "ES256");
    expect(periods(es256.slice(2))).toBe("3: 180-270, 4: 180-270");
  });

  scenario("a planted row, in clear or sealed otherwise, is passed over", async (table) => {
    const { poll, publishes, jwks, rows, first } = await begin(table, { secret, polls: true });
    const kid = await jose.calculateJwkThumbprint(robot.publicJwk);
    const { generation: _generation, jwk: _jwk, alg: key_alg, ...dates } = { ...first, kid };
    const sealedAs = (alg: string, enc: string) =>
      new jose.CompactEncrypt(Buffer.from(foreign))
        .setProtectedHeader({ alg, enc, key_alg, ...dates })
        .encrypt(Buffer.from(secret, "base64url"));
    const otherwise = [sealedAs("dir", "A128CBC-HS256"), sealedAs("A256GCMKW", "A256GCM")];
    for (const [index, jwk] of [foreign, ...(await Promise.all(otherwise))].entries()) {
      const row = { ...dates, alg: key_alg, generation: 7 + index, jwk };
      await table.sql`INSERT INTO signing_keys ${table.sql(row)}`;
    }
    await poll();
    expect(await publishes()).toEqual(kids(rows));
    // The same row, sealed as it should be, is a key: so it was the sealing that was refused.
    await table.change(change(7, `jwk = '${await sealedAs("dir", "A256GCM")}'`));
    await poll();
    const published = (await jwks()).find((jwk) => jwk.kid === kid)!;
    const members = ["alg", "crv", "kid", "kty", "use", "x", "y"];
    expect(Object.keys(published).toSorted()).toEqual(members);
  });

  // --- The key encryption secret -----------------------------------------------------------------

  scenario("without a secret the rows hold private JWKs, with it JWEs", async (table) => {
    const expectPrivateKey = async ({ kid }: Row, text = "") => {
      expect(Object.keys(JSON.parse(text)).toSorted()).toEqual(["crv", "d", "kty", "x", "y"]);
      expect(await jose.calculateJwkThumbprint(JSON.parse(text))).toBe(kid);
    };
    const { rows, first } = await begin(table);
    for (const row of rows) await expectPrivateKey(row, row.jwk);
    expect(await refusal(table, { secret })).toContain(first.kid);
    await table.change("DELETE FROM signing_keys");
    const { rows: sealed } = await begin(table, { secret });
    for (const row of sealed) {
      const { kid, signs_from, signs_until, removed_at } = row;
      const header = { alg: "dir", enc: "A256GCM", kid, signs_from, signs_until, removed_at };
      expect(jose.decodeProtectedHeader(row.jwk)).toMatchObject(header);
      await expectPrivateKey(row, await unseal(row));
    }
    expect(await (await start(table, { secret: `${secret},none` })).shows()).toBe("1 of 1,2");
    for (const wrong of [newSecret(), "", "none", `${newSecret()},none`])
      expect(await refusal(table, { secret: wrong })).toContain(sealed[0]!.kid);
    expect(await table.rows()).toEqual(sealed);
  });

  scenario("from clear to sealed: `none` lets them be read, and sealed at once", async (table) => {
    const { rows, first } = await begin(table);
    expect(await (await start(table, { secret: "none" })).shows()).toBe("1 of 1,2");
    expect(await table.rows()).toEqual(rows);
    const both = await start(table, { secret: `none,${secret}`, polls: true });
    const sealed = await table.rows();
    expect(sealed.map(isClear)).toEqual([false, false]);
    expect(sealed.map((row, index) => ({ ...row, jwk: rows[index]!.jwk }))).toEqual(rows);
    expect(await both.shows()).toBe("1 of 1,2");
    await table.change(change(1, `jwk = '${first.jwk}'`)); // while it runs, too
    await both.poll();
    expect((await table.rows()).map(isClear)).toEqual([false, false]);
    expect(await (await start(table, { secret })).shows()).toBe("1 of 1,2");
  });

  scenario("from old to new: `old,new`, then `new,old`, then `new`", async (table) => {
    const fresh = newSecret();
    const { first, rows } = await begin(table, { secret });
    expect(await refusal(table, { secret: fresh })).toContain(first.kid);
    await start(table, { secret: `${secret},${fresh}`, at: after(90) });
    const changing = await start(table, { secret: `${fresh},${secret}`, at: after(180) });
    const [third, fourth] = (await table.rows()).slice(2) as [Row, Row];
    expect([await unseal(third, fresh), await unseal(fourth)]).toEqual([undefined, undefined]);
    expect([await unseal(third), await unseal(fourth, fresh)]).not.toContain(undefined);
    expect(await changing.shows()).toBe("3 of 2,3,4");
    expect(await refusal(table, { secret: fresh, at: after(180) })).toContain(third.kid);
    const changed = await start(table, { secret: fresh, at: after(270) });
    expect(await changed.signs()).toBe(fourth.kid);
    expect((await table.rows()).slice(0, 2)).toEqual(rows);
  });

  // --- Polls that fail, used identifiers ---------------------------------------------------------

  scenario("a server that was stopped polls no more", async (table) => {
    const { running } = await begin(table, { polls: true });
    await running.stop();
    const { length } = running.lines;
    await Bun.sleep(50); // five polls
    expect(running.lines).toHaveLength(length);
  });

  for (const lost of ["signing_keys", "used_jtis"])
    scenario(`${lost} is gone: degraded, until it is back`, async (table) => {
      const { poll, shows, health, running, rows } = await begin(table, { polls: true });
      const becomes = (status: string) =>
        eventually(status, async () => (await health()) === status);
      const reports = (name: string) => running.lines.filter(({ event }) => event === name);
      expect(await health()).toBe("200 ok");
      await table.change(`ALTER TABLE ${lost} RENAME TO elsewhere`);
      await becomes("200 degraded");
      expect(reports("database away")[0]!["reason"]).toBeString();
      expect(reports("database back")).toEqual([]);
      await table.change(`ALTER TABLE elsewhere RENAME TO ${lost}`);
      await becomes("200 ok");
      await poll();
      const length = reports("database back").length;
      for (let polls = 0; polls < 3; polls++) await poll();
      expect([length > 0, reports("database back").length]).toEqual([true, length]);
      expect(await shows()).toBe("1 of 1,2");
      expect(await table.rows()).toEqual(rows);
    });

  scenario("identifiers are swept 15 minutes late, or a month", async (table) => {
    const { poll } = await begin(table, { polls: true });
    for (const late of [30 * day + 1, 901, 900, 899, 0])
      await table.change(`INSERT INTO used_jtis VALUES ('late ${late}', ${after(0, 1 - late)})`);
    await poll(); // what was over before the first poll stays for a month
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 899", "late 901"]);
    await poll();
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 901"]);
  });

  scenario("a clock that is an hour ahead, or jumps, forgets no identifier", async (table) => {
    const { once, poll, clock, running } = await begin(table, { polls: true });
    expect((await once("used")).status).toBe(200);
    const hasty = await start(table, { at: after(0, 3_600), polls: true });
    for (const at of [after(0, 3_601), after(0, 7_200)]) await hasty.poll(at);
    await poll(after(0, 3_600));
    clock.now = after(0);
    expect(refusalOf(await once("used"))).toBe("401 invalid_client");
    expect(running.lines.findLast(({ error }) => error)!["reason"]).toContain("jti");
  });

  scenario("a used identifier is kept until nobody accepts it any more", async (table) => {
    const { once, token, running } = await begin(table);
    const kept = async () => {
      const rows = await table.sql`SELECT expires_at FROM used_jtis WHERE expires_at > ${after(0)}`;
      await table.change("DELETE FROM used_jtis");
      return rows.map((row: { expires_at: unknown }) => Number(row.expires_at));
    };
    expect([(await once()).status, await kept()]).toEqual([200, [after(0, 60 + 30)]]);
    const dpop = await proof(robot, "POST", running.tokenEndpoint, "", { iat: after(0, -5) });
    expect([(await token({ dpop })).status, await kept()]).toEqual([200, [after(0, 90 - 5)]]);
  });

  scenario("a table that lost its primary key: 503, for a replay would pass", async (table) => {
    const { once, health, shows } = await begin(table);
    await table.change("DROP TABLE used_jtis");
    await table.change("CREATE TABLE used_jtis (id TEXT, expires_at BIGINT NOT NULL)");
    expect(refusalOf(await once())).toBe("503 temporarily_unavailable");
    expect([await health(), await shows()]).toEqual(["200 degraded", "1 of 1,2"]);
  });
}

// --- SQLite files --------------------------------------------------------------------------------

const mode = (path: string) => (statSync(path).mode & 0o7777).toString(8);

for (const form of ["sqlite://FILE", "sqlite:FILE", "sqlite://FILE?mode=rwc"])
  test(`SQLite, ${form}: directories 0700, files 0600, WAL`, async () => {
    const directory = join(temporaryDirectory(), "new/keys");
    const umask = process.umask(0);
    const table = new Table(form.replace("FILE", join(directory, "keys.db")));
    await begin(table).finally(() => process.umask(umask));
    expect([mode(dirname(directory)), mode(directory)]).toEqual(["700", "700"]);
    expect(readdirSync(directory).toSorted()).toEqual(["keys.db", "keys.db-shm", "keys.db-wal"]);
    for (const name of readdirSync(directory)) expect(mode(join(directory, name))).toBe("600");
    expect((await table.sql`PRAGMA journal_mode`)[0]).toEqual({ journal_mode: "wal" });
    await table.close();
  });

/** Which of the files of a database hold the private part of a key. */
const holding = ({ file }: Table, { jwk }: Row) =>
  ["", "-wal"].filter((end) => readFileSync(file + end, "latin1").includes(JSON.parse(jwk).d));

test("SQLite: a key that is revoked, removed or sealed is gone from the files", async () => {
  const table = await sqlite();
  const { poll, running, clock, rows, first, second } = await begin(table, { polls: true });
  for (const row of rows) expect(holding(table, row)).toEqual([""]); // not in the journal
  await table.change("PRAGMA secure_delete = ON"); // as an operator's program deletes
  await table.change(remove(1));
  await poll();
  await eventually("the revoked key is gone", () => holding(table, first).length === 0);
  for (const seconds of [899, 900]) await poll(second.removed_at + seconds);
  const left = await table.rows();
  expect(kids(left)).not.toContain(second.kid);
  await eventually("the removed key is gone", () => holding(table, second).length === 0);
  await running.stop();
  const sealing = await start(table, { at: clock.now, secret: `${newSecret()},none` });
  expect((await table.rows()).map(isClear)).not.toContain(true);
  for (const row of left) expect(holding(table, row)).toEqual([]);
  expect(await sealing.publishes()).toEqual(kids(left));
  await table.close();
});

for (const journal of ["WAL", "DELETE"])
  test(`SQLite, journal ${journal}: one that can only be read signs, and is degraded`, async () => {
    const table = await sqlite();
    const { running } = await begin(table);
    await running.stop();
    await table.change(remove(2)); // a successor is missing, and cannot be made
    await table.change(`PRAGMA journal_mode = ${journal}`);
    const reading = new Table(`${table.url}?mode=ro`);
    for (const words of ["", `${newSecret()},none`]) {
      const { shows, health, once } = await start(reading, { secret: words });
      expect([await shows(), await health()]).toEqual(["1 of 1", "200 degraded"]);
      expect(refusalOf(await once())).toBe("503 temporarily_unavailable");
    }
    expect(await refusal(reading, { at: after(90) })).toContain(table.file);
    for (const one of [reading, table]) await one.close();
  });

const noDatabase = Buffer.from("This is no database. ".repeat(500));
const damaged = Buffer.concat([Buffer.from("SQLite format 3\0"), noDatabase]);
for (const [what, end, content] of [
  ["is no database", "", noDatabase],
  ["is damaged", "", damaged],
  ["would be in a file", "/keys.db", noDatabase],
] as const)
  test(`SQLite: a file that ${what} → no start, it is named and stays as it was`, async () => {
    const file = join(temporaryDirectory(), "wrong.db");
    writeFileSync(file, content);
    expect(await refusal(new Table(`sqlite://${file}${end}`))).toContain(file);
    expect(readFileSync(file).equals(content)).toBe(true);
  });
