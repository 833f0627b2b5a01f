/**
 * The life of a signing key, seen by clients, by APIs and by an operator who looks into the table.
 * Time is a variable here; an instance polls every few milliseconds only where a test says so.
 */

import { describe, expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import * as jose from "jose";
import { authorizationServer, type AuthorizationServerSettings } from "../../config.ts";
import { engines, eventually, type Row, sqlite, Table } from "../support/databases.ts";
import { type Answer, basic, post, send } from "../support/http.ts";
import { assertion, assertionType, key, proof } from "../support/jwt.ts";
import { temporaryDirectory } from "../support/programs.ts";
import { api, idp, reservePort } from "../support/servers.ts";

const day = 86_400;
const { rotationSeconds: rotation, retentionSeconds: retention } = authorizationServer.signingKeys;
/** When every test begins, in seconds: nothing here looks at the clock on the wall. */
const t0 = 2_000_000_000;
const newSecret = () => randomBytes(32).toString("base64url");

const robot = await key();
const grant_types = ["client_credentials"];
const keyClient = {
  client_id: "robot",
  grant_types,
  scope: "api1",
  jwks: { keys: [robot.publicJwk] },
};
const clients = [
  ...authorizationServer.clients,
  { ...keyClient, access_token_lifetime_seconds: 60 },
];

// --- Instances -----------------------------------------------------------------------------------

interface Options {
  at?: number;
  secret?: string;
  keys?: Partial<AuthorizationServerSettings["signingKeys"]>;
  /** Whether it reads the table every few milliseconds, or at its start alone. */
  polls?: boolean;
  more?: Partial<AuthorizationServerSettings>;
}

/** An authorization server on a table, with a clock of its own. */
class Instance {
  at: number;
  running!: Awaited<ReturnType<typeof idp>>;
  readonly #table: Table;

  constructor(table: Table, at: number) {
    this.#table = table;
    this.at = at;
  }

  async start({ secret = "", keys = {}, polls = false, more = {} }: Options): Promise<this> {
    // Polls of PostgreSQL take longer, and must not overtake one another.
    const pollSeconds = polls ? (this.#table.url.startsWith("sqlite") ? 0.005 : 0.02) : 20 * day;
    this.running = await idp({
      ...{ databaseUrl: this.#table.url, clients, keyEncryptionSecret: secret },
      signingKeys: { ...authorizationServer.signingKeys, pollSeconds, ...keys },
      ...{ databaseWaitSeconds: 0, clock: () => this.at * 1000, ...more },
    });
    this.#table.users.push(this.running);
    return this;
  }

  async token(at = this.at, more: Record<string, string> = {}): Promise<Answer> {
    this.at = at;
    const headers = { authorization: basic("client", "secret"), ...more };
    return await post(this.running.tokenEndpoint, { grant_type: "client_credentials" }, headers);
  }

  /** A token request with something that may be used once. */
  async once(): Promise<Answer> {
    const claims = { iat: this.at, exp: this.at + 60 };
    const client_assertion = await assertion(robot, "robot", this.running.url, claims);
    const client = { client_assertion, client_assertion_type: assertionType };
    return await post(this.running.tokenEndpoint, { grant_type: "client_credentials", ...client });
  }

  /** The kid of the key that signs. */
  async signs(at = this.at): Promise<string | undefined> {
    const { json } = await this.token(at);
    return json.access_token && jose.decodeProtectedHeader(json.access_token).kid;
  }

  async jwks(): Promise<jose.JWK[]> {
    return (await send(`${this.running.url}/.well-known/openid-configuration/jwks`)).json.keys;
  }

  async publishes(at = this.at): Promise<string[]> {
    this.at = at;
    return (await this.jwks()).map(({ kid }) => kid!);
  }

  async health(): Promise<[number, string]> {
    const { status, json } = await send(`${this.running.url}/health`);
    return [status, json.status];
  }

  /** The kids that the log names in lines about such an event. */
  logged(name: string): unknown[] {
    return this.running.lines.filter(({ event }) => event === name).map(({ kid }) => kid);
  }

  /** Moves the clock on, and waits until a poll at that time has swept what it alone can sweep. */
  async poll(at = this.at + 1): Promise<void> {
    const id = `mark ${crypto.randomUUID()}`;
    await this.#table.change(`INSERT INTO used_jtis VALUES ('${id}', ${at - 901})`);
    this.at = at;
    const isGone = async () => (await this.#table.identifiers(id)).length === 0;
    await eventually("a poll has swept", isGone);
  }
}

/** Starts an instance, at first with an empty table. */
const start = (table: Table, options: Options = {}) =>
  new Instance(table, options.at ?? t0).start(options);

/** What a start says that fails. */
async function refusal(table: Table, options: Options = {}): Promise<string> {
  return await start(table, options).then(
    () => "it started",
    (error: Error) => error.message,
  );
}

/** A first instance, and the two rows that it made. */
async function begin(table: Table, options: Options = {}) {
  const instance = await start(table, options);
  const rows = await table.rows();
  const [first, second] = rows as [Row, Row];
  return { instance, rows, first, second };
}

const kids = (rows: Row[]) => rows.map(({ kid }) => kid);
/** Generation and period of each row, in rotations and seconds since the beginning. */
const dates = (rows: Row[]) =>
  rows.map((row) => [row.generation, row.signs_from - t0, row.signs_until - t0]);
const third = [3, 2 * rotation, 3 * rotation];
const change = (generation: number, assignment: string) =>
  `UPDATE signing_keys SET ${assignment} WHERE generation = ${generation}`;
const remove = (generation: number) => `DELETE FROM signing_keys WHERE generation = ${generation}`;
const isClear = ({ jwk }: Row) => jwk.startsWith("{");

/** The text of a sealed JWK, or undefined where the secret does not open it. */
async function unseal({ jwk }: Row, secret: string): Promise<string | undefined> {
  const opening = jose.compactDecrypt(jwk, Buffer.from(secret, "base64url"));
  return await opening.then(
    ({ plaintext }) => new TextDecoder().decode(plaintext),
    () => undefined,
  );
}

for (const { engine, make, isMissing } of engines) {
  const scenario = (name: string, run: (table: Table) => Promise<void>) =>
    test.skipIf(isMissing)(`signing keys, ${engine}: ${name}`, async () => {
      const table = await make();
      await run(table).finally(() => table.close());
    });

  // --- Life --------------------------------------------------------------------------------------

  scenario("the first start makes two; the second follows the first", async (table) => {
    const { instance, rows, first } = await begin(table);
    const second = [2, rotation, 2 * rotation];
    expect(dates(rows)).toEqual([[1, 0, rotation], second]);
    expect(rows.map((row) => row.removed_at - row.signs_until)).toEqual([retention, retention]);
    expect(await instance.publishes()).toEqual(kids(rows));
    expect(await instance.signs()).toBe(first.kid);
    expect(instance.logged("key made")).toEqual(kids(rows));
    const again = await start(table);
    expect(again.logged("key made")).toEqual([]);
    expect(await table.rows()).toEqual(rows);
  });

  scenario("one signs until signs_until, and is public until removed_at", async (table) => {
    const { instance, first, second } = await begin(table);
    expect(await instance.signs(t0 + rotation - 1)).toBe(first.kid);
    expect(await instance.signs(t0 + rotation)).toBe(second.kid);
    expect(await instance.signs(t0 + 2 * rotation - 1)).toBe(second.kid);
    expect(await instance.health()).toEqual([200, "ok"]);
    expect(await instance.publishes(first.removed_at - 1)).toEqual([first.kid, second.kid]);
    expect(await instance.publishes(first.removed_at)).toEqual([second.kid]);
    const { status, headers, json } = await instance.token(t0 + 2 * rotation);
    expect([status, json.error]).toEqual([503, "temporarily_unavailable"]);
    expect(headers.get("retry-after")).toBe("5");
    expect(await instance.health()).toEqual([503, "unavailable"]);
    expect(await instance.publishes(second.removed_at - 1)).toEqual([second.kid]);
    expect(await instance.publishes(second.removed_at)).toEqual([]);
  });

  scenario("three rotations: one signs, one follows, those of old tokens stay", async (table) => {
    const { instance, rows } = await begin(table, { polls: true });
    for (const turn of [1, 2, 3]) {
      const at = t0 + turn * rotation;
      await instance.poll(at - 1);
      expect(await table.rows()).toEqual(rows);
      expect(await instance.signs()).toBe(rows.at(-2)!.kid);
      await instance.poll(at);
      const made = (await table.rows()).at(-1)!;
      expect(dates([made])).toEqual([[turn + 2, (turn + 1) * rotation, (turn + 2) * rotation]]);
      rows.push(made);
      expect(await table.rows()).toEqual(rows);
      expect(await instance.publishes()).toEqual(kids(rows.slice(-3)));
      expect(await instance.signs()).toBe(rows.at(-2)!.kid);
      // The old key is deleted a quarter of an hour after it was published last.
      const { removed_at, kid } = rows.at(-3)!;
      await instance.poll(removed_at + 899);
      expect(await table.rows()).toEqual(rows);
      await instance.poll(removed_at + 900);
      rows.splice(-3, 1);
      expect(await table.rows()).toEqual(rows);
      await instance.poll();
      expect(instance.logged("key removed")[turn - 1]).toBe(kid);
    }
    expect(instance.logged("key removed")).toHaveLength(3);
    expect(instance.logged("key skipped")).toEqual([]);
  });

  scenario("no poll deletes the keys of others by a clock that is ahead", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    await instance.poll(t0 + 280 * day);
    const rows = await table.rows();
    expect(rows.slice(0, 2)).toEqual([first, second]);
    expect(rows).toHaveLength(4); // its own sign at once, for the others are over by its clock
    const right = await start(table);
    expect(await right.signs()).toBe(first.kid);
    expect(await right.publishes()).toEqual(kids(rows));
    await start(table, { at: first.removed_at + 900 });
    await start(table, { at: t0 + 3000 * day });
    expect((await table.rows()).slice(0, 2)).toEqual([first, second]);
  });

  for (const [seconds, isDeleted] of [
    [900, true],
    [901, false],
  ] as const)
    scenario(
      `after ${seconds} s between two polls a key is deleted: ${isDeleted}`,
      async (table) => {
        const { instance, first } = await begin(table, { polls: true });
        await instance.poll(first.removed_at + 850);
        await instance.poll(first.removed_at + 850 + seconds);
        expect(kids(await table.rows()).includes(first.kid)).toBe(!isDeleted);
      },
    );

  for (const polls of [true, false])
    scenario(`off for two rotations, ${polls ? "asleep" : "stopped"}: a new one`, async (table) => {
      const { instance: before, second } = await begin(table, { polls });
      const after = async (at: number) => {
        if (!polls) return await start(table, { at });
        await before.poll(at);
        return before;
      };
      const almost = await after(t0 + 2 * rotation - 1);
      expect(await almost.signs()).toBe(second.kid);
      expect(dates((await table.rows()).slice(2))).toEqual([third]);
      await table.change(remove(3));
      const late = await after(t0 + 2 * rotation);
      const rows = (await table.rows()).slice(-2);
      expect(dates(rows)).toEqual([third, [4, 3 * rotation, 4 * rotation]]);
      expect(await late.signs()).toBe(rows[0]!.kid);
      expect(await late.publishes()).toEqual([second.kid, ...kids(rows)]); // for its last tokens
      const later = await after(t0 + 9 * rotation);
      const signing = (await table.rows()).at(-2)!;
      expect(dates([signing])).toEqual([[5, 9 * rotation, 10 * rotation]]);
      expect(await later.signs()).toBe(signing.kid);
    });

  scenario("clocks some seconds apart: the same keys, public before they sign", async (table) => {
    const { instance: right, first, second } = await begin(table, { polls: true });
    const early = await start(table, { at: t0 - 5 }); // the first has not begun by its clock
    expect(await early.signs()).toBe(first.kid);
    expect(await table.rows()).toEqual([first, second]);
    const ahead = await start(table, { at: t0 + rotation + 2 });
    await right.poll(t0 + rotation - 3);
    const behind = await start(table, { at: t0 + rotation - 8 });
    const rows = await table.rows();
    expect(dates(rows)[2]).toEqual(third);
    for (const one of [ahead, right, behind]) expect(await one.publishes()).toEqual(kids(rows));
    expect(await ahead.signs()).toBe(second.kid);
    expect(await right.signs()).toBe(first.kid);
    expect(await behind.signs()).toBe(first.kid);
  });

  scenario("instances that start or rotate together make one row each time", async (table) => {
    const together = async (at: number) =>
      await Promise.all([0, 1, 2, 3].map(async (ahead) => await start(table, { at: at + ahead })));
    const instances = await together(t0);
    const rows = await table.rows();
    expect(rows.map(({ generation }) => generation)).toEqual([1, 2]);
    for (const one of instances) expect(await one.publishes()).toEqual(kids(rows));
    expect(instances.flatMap((one) => one.logged("key made")).sort()).toEqual(kids(rows).sort());
    const rotating = await together(t0 + rotation + 9);
    expect(await table.rows()).toHaveLength(3);
    for (const one of rotating) expect(await one.publishes()).toEqual(kids(await table.rows()));
  });

  scenario("an API that fetched keys before a rotation knows the next one", async (table) => {
    const reserved = reservePort();
    const url = `http://127.0.0.1:${reserved.port}`;
    const scopes = [{ scope: "api1", description: "My API", resource: url }];
    const instance = await start(table, { polls: true, more: { scopes } });
    const clock = () => instance.at * 1000;
    const never = { refreshSeconds: 20 * day, coolDownSeconds: 20 * day };
    const rules = { resource: url, reusePort: true, clock, ...never };
    const protectedApi = await api(instance.running.url, rules);
    table.users.push(protectedApi);
    reserved.release();
    const call = async (access_token: string) => {
      const headers = { authorization: `Bearer ${access_token}` };
      return (await send(`${url}/identity`, { headers })).status;
    };
    await instance.poll(t0 + rotation - 9);
    const before = (await instance.token()).json.access_token;
    expect(await call(before)).toBe(200);
    await instance.poll(t0 + rotation + 9);
    const after = (await instance.token()).json.access_token;
    const [first, second] = [before, after].map((jwt) => jose.decodeProtectedHeader(jwt).kid);
    expect(first).not.toBe(second);
    await instance.running.stop(); // so the keys cannot be fetched again
    expect([await call(before), await call(after)]).toEqual([200, 200]);
  });

  scenario("several algorithms: two keys of each, the first one signs", async (table) => {
    const algorithms = ["Ed25519", "ES256", "ML-DSA-44"];
    const { instance } = await begin(table, { keys: { algorithms }, polls: true });
    const of = async (alg: string) => (await table.rows()).filter((row) => row.alg === alg);
    for (const alg of algorithms) expect(await of(alg)).toHaveLength(2);
    await instance.poll(t0 + rotation);
    for (const alg of algorithms) expect(dates(await of(alg))[2]).toEqual(third);
    expect(await instance.signs()).toBe((await of("Ed25519"))[1]!.kid);
    expect((await instance.publishes()).sort()).toEqual(kids(await table.rows()).sort());
  });

  scenario("a change of algorithm: second, then first, then alone", async (table) => {
    const { instance: old, first, rows } = await begin(table, { polls: true });
    const second = await start(table, { keys: { algorithms: ["ES256", "Ed25519"] } });
    const all = await table.rows();
    const ed1 = all.find(({ alg }) => alg === "Ed25519")!;
    expect(all).toHaveLength(4);
    expect((await second.publishes()).sort()).toEqual(kids(all).sort());
    expect(await second.signs()).toBe(first.kid);
    // An instance that does not know the algorithm yet publishes its keys all the same.
    await old.poll();
    expect((await old.publishes()).sort()).toEqual(kids(all).sort());
    await old.running.stop();
    const changed = await start(table, { keys: { algorithms: ["Ed25519", "ES256"] } });
    expect(await changed.signs()).toBe(ed1.kid);
    const alone = await start(table, { keys: { algorithms: ["Ed25519"] }, polls: true });
    expect(await alone.signs()).toBe(ed1.kid);
    for (const at of [first.removed_at - 1, first.removed_at]) {
      await alone.poll(at);
      const es256 = (await alone.jwks()).filter(({ alg }) => alg === "ES256");
      const expected = kids(rows.filter(({ removed_at }) => removed_at > at));
      expect(es256.map(({ kid }) => kid!)).toEqual(expected);
    }
    expect((await table.rows()).filter(({ alg }) => alg === "ES256")).toEqual(rows);
  });

  scenario("another rotation and retention: no key gets other dates", async (table) => {
    const { rows } = await begin(table);
    const keys = { rotationSeconds: 70 * day, retentionSeconds: 20 * day };
    const instance = await start(table, { keys, polls: true });
    await instance.poll(t0 + rotation - 1);
    expect(await table.rows()).toEqual(rows);
    await instance.poll(t0 + rotation);
    const [made] = (await table.rows()).splice(2, 1);
    expect(dates([made!])).toEqual([[3, 2 * rotation, 2 * rotation + 70 * day]]);
    expect(made!.removed_at).toBe(made!.signs_until + 20 * day);
    expect((await table.rows()).slice(0, 2)).toEqual(rows);
  });

  // --- Rows that an operator touches -------------------------------------------------------------

  /** What is done to the table; then the generations of all rows, and that of the one that signs. */
  const touches: [string, string, number[], number][] = [
    ["the row that signs is deleted", remove(1), [2, 3], 2],
    ["the row of the successor is deleted", remove(2), [1, 2], 1],
    ["the successor overlaps", change(2, `signs_from = ${t0 + rotation - 1}`), [1, 2, 3], 1],
    [
      "both have one period",
      change(2, `signs_from = ${t0}, signs_until = ${t0 + rotation}`),
      [1, 2, 3],
      1,
    ],
    ["generations are out of order", change(1, "generation = 9"), [2, 9], 9],
  ];
  for (const [what, statement, generations, signing] of touches)
    scenario(`${what}: ${generations} are left, and ${signing} signs`, async (table) => {
      const { instance, rows: before } = await begin(table, { polls: true });
      await table.change(statement);
      await instance.poll();
      const rows = await table.rows();
      expect(rows.map(({ generation }) => generation)).toEqual(generations);
      expect(await instance.signs()).toBe(rows.find((row) => row.generation === signing)!.kid);
      expect((await instance.publishes()).sort()).toEqual(kids(rows).sort());
      const gone = kids(before).filter((kid) => !kids(rows).includes(kid));
      expect(instance.logged("key removed")).toEqual(gone);
      // Where one was made, it follows the one before.
      const made = rows.at(-1)!;
      if (!kids(before).includes(made.kid))
        expect([rotation, 2 * rotation]).toContain(made.signs_from - t0);
      await instance.poll();
      expect(await table.rows()).toEqual(rows);
    });

  scenario("the row of one that has signed is deleted: only that is gone", async (table) => {
    const { instance } = await begin(table, { polls: true });
    await instance.poll(t0 + rotation);
    const rows = await table.rows();
    await table.change(remove(1));
    await instance.poll();
    expect(await table.rows()).toEqual(rows.slice(1));
    expect(await instance.publishes()).toEqual(kids(rows.slice(1)));
  });

  scenario("all rows are deleted: a new one signs at once", async (table) => {
    const { instance, rows } = await begin(table, { polls: true });
    await instance.poll(t0 + day);
    await table.change("DELETE FROM signing_keys");
    await instance.poll();
    const after = await table.rows();
    const [signing] = dates(after);
    expect([day, day + 1]).toContain(signing![1]!); // by which of the polls it was made
    expect(dates(after)[1]).toEqual([2, signing![2]!, signing![2]! + rotation]);
    expect(await instance.publishes()).toEqual(kids(after));
    expect(await instance.signs()).toBe(after[0]!.kid);
    expect(kids(rows)).not.toContain(after[0]!.kid);
  });

  scenario("a row in clear counts as it is dated; expires_in is never negative", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    expect((await instance.token()).json.expires_in).toBe(3600);
    const end = t0 + 100;
    await table.change(change(1, `signs_until = ${end}, removed_at = ${end}`));
    await instance.poll();
    const { access_token, expires_in } = (await instance.token(end - 1)).json;
    const { exp, iat } = jose.decodeJwt(access_token);
    expect([exp, iat, expires_in]).toEqual([end, end - 1, 1]);
    expect(jose.decodeProtectedHeader(access_token).kid).toBe(first.kid);
    expect(await instance.signs(end)).toBe(second.kid);
    expect(await instance.publishes()).not.toContain(first.kid);
  });

  // --- Rows that cannot be used ------------------------------------------------------------------

  const damagedKey = JSON.stringify({ kty: "EC", crv: "P-256", x: "AA", y: "AA" });
  const secret = newSecret();
  /** What becomes of the first row; the secret of the instance. */
  const damages: [string, string, (second: Row) => string][] = [
    ["holds no JSON", "", () => "jwk = '{garbled'"],
    ["holds no key", "", () => "jwk = '{}'"],
    ["holds a damaged key", "", () => `jwk = '${damagedKey}'`],
    ["holds another key", "", () => `jwk = '${JSON.stringify(robot.privateJwk)}'`],
    ["holds what somebody sealed", "", () => "jwk = 'e30..AA.AA.AA'"],
    ["holds nothing", "", () => "jwk = ''"],
    ["has a kid that is not its thumbprint", "", () => "kid = 'another'"],
    ["is removed before it stops to sign", "", () => `removed_at = ${t0 + rotation - 1}`],
    ["is removed long ago", "", () => `removed_at = ${t0 - 1}`],
    ["begins when it is over", "", () => "signs_from = signs_until"],
    ["was sealed, and signs longer", secret, () => "signs_until = signs_until + 9"],
    ["was sealed, and signs earlier", secret, () => "signs_from = signs_from - 9"],
    ["was sealed, and is public longer", secret, () => "removed_at = removed_at + 9"],
    ["was sealed, and has another kid", secret, () => "kid = 'another'"],
    ["was sealed, and holds another", secret, ({ jwk }) => `jwk = '${jwk}'`],
    ["was sealed, and is another", secret, ({ jwk, kid }) => `jwk = '${jwk}', kid = '${kid}'`],
    [
      "is in clear, though others are sealed",
      secret,
      () => `jwk = '${JSON.stringify(robot.privateJwk)}'`,
    ],
  ];
  for (const [what, words, assignment] of damages)
    scenario(`a row ${what}: it is reported and passed over, at a start fatal`, async (table) => {
      const { instance, first, second } = await begin(table, { secret: words, polls: true });
      await table.change(change(1, assignment(second)));
      const [damaged] = (await table.rows()) as [Row];
      const said = await refusal(table, { secret: words });
      expect(said).toContain(damaged.kid);
      expect(said).toContain("KEY_ENCRYPTION_SECRET");
      await instance.poll();
      expect(await instance.signs()).toBe(second.kid);
      const rows = await table.rows();
      expect(rows.slice(0, 2)).toEqual([damaged, second]);
      expect(dates(rows.slice(2))).toEqual([third]);
      expect(await instance.publishes()).toEqual(kids(rows.slice(1)));
      expect(instance.logged("key skipped")).toContain(damaged.kid);
      expect(await refusal(table, { secret: words, at: t0 + rotation - 1 })).toBe(said);
      const { jwk, kid, signs_from, signs_until, removed_at } = first;
      const dated = `signs_from = ${signs_from}, signs_until = ${signs_until}`;
      await table.change(
        change(1, `jwk = '${jwk}', kid = '${kid}', removed_at = ${removed_at}, ${dated}`),
      );
      await instance.poll();
      expect(await instance.signs()).toBe(first.kid);
    });

  scenario("a start is refused for a row until it is over, and then starts", async (table) => {
    await begin(table);
    await table.change(change(1, "jwk = ''"));
    const rows = await table.rows();
    expect(await refusal(table, { at: t0 + rotation - 1 })).toContain(rows[0]!.kid);
    expect(await table.rows()).toEqual(rows);
    expect(await refusal(table, { at: t0 + rotation })).toBe("it started");
    await table.change("UPDATE signing_keys SET jwk = '' WHERE generation <> 2");
    const instance = await start(table, { at: t0 + rotation });
    const made = (await table.rows()).at(-1)!;
    expect(dates([made])).toEqual([[4, 2 * rotation, 3 * rotation]]);
    expect(await instance.publishes()).toEqual([rows[1]!.kid, made.kid]);
  });

  scenario("the row of a second algorithm cannot be opened: no row changes", async (table) => {
    const keys = { algorithms: ["ES256", "Ed25519"] };
    await begin(table, { keys });
    await table.change(`${remove(2)} AND alg = 'ES256'`);
    await table.change(`${change(1, "jwk = ''")} AND alg = 'Ed25519'`);
    const rows = await table.rows();
    const unusable = rows.find(({ alg }) => alg === "Ed25519")!;
    expect(await refusal(table, { keys })).toContain(unusable.kid);
    expect(await table.rows()).toEqual(rows);
    expect(await refusal(table)).toBe("it started");
  });

  scenario("a planted row, in clear or sealed otherwise, is passed over", async (table) => {
    const { instance, rows, first } = await begin(table, { secret, polls: true });
    const { kid: _kid, alg: _alg, ...jwk } = robot.privateJwk;
    const kid = await jose.calculateJwkThumbprint(jwk);
    const { signs_until, removed_at } = first;
    const sealedDates = { signs_from: t0 - 9, signs_until, removed_at };
    const sealedAs = async (alg: string, enc: string) =>
      await new jose.CompactEncrypt(Buffer.from(JSON.stringify(jwk)))
        .setProtectedHeader({ alg, enc, kid, key_alg: "ES256", ...sealedDates })
        .encrypt(Buffer.from(secret, "base64url"));
    const planted = [
      JSON.stringify(jwk),
      await sealedAs("dir", "A128CBC-HS256"),
      await sealedAs("A256GCMKW", "A256GCM"),
    ];
    for (const [index, text] of planted.entries()) {
      const row = { alg: "ES256", generation: 7 + index, kid, jwk: text, ...sealedDates };
      await table.sql`INSERT INTO signing_keys ${table.sql(row)}`;
    }
    await instance.poll();
    expect(await instance.publishes()).toEqual(kids(rows));
    expect(await instance.signs()).toBe(first.kid);
    // The same row, sealed as it should be, is a key: so it was the sealing that was refused.
    await table.change(change(7, `jwk = '${await sealedAs("dir", "A256GCM")}'`));
    await instance.poll();
    expect(await instance.signs()).toBe(kid);
  });

  // --- The key encryption secret -----------------------------------------------------------------

  const ecMembers = ["crv", "d", "kty", "x", "y"];

  scenario("without a secret the rows hold private JWKs, with it JWEs", async (table) => {
    const { rows, first, instance } = await begin(table);
    await instance.running.stop();
    for (const { jwk, kid } of rows) {
      expect(Object.keys(JSON.parse(jwk)).sort()).toEqual(ecMembers);
      expect(await jose.calculateJwkThumbprint(JSON.parse(jwk))).toBe(kid);
    }
    expect(await refusal(table, { secret })).toContain(first.kid);
    await table.change("DELETE FROM signing_keys");
    await start(table, { secret });
    const sealed = await table.rows();
    for (const row of sealed) {
      const { kid, signs_from, signs_until, removed_at } = row;
      const header = { alg: "dir", enc: "A256GCM", kid, signs_from, signs_until, removed_at };
      expect(jose.decodeProtectedHeader(row.jwk)).toMatchObject(header);
      expect(Object.keys(JSON.parse((await unseal(row, secret))!)).sort()).toEqual(ecMembers);
    }
    const again = await start(table, { secret: `${secret},` });
    expect(await again.publishes()).toEqual(kids(sealed));
    for (const wrong of [newSecret(), "", "none", `${newSecret()},none`])
      expect(await refusal(table, { secret: wrong })).toContain(sealed[0]!.kid);
    expect(await table.rows()).toEqual(sealed);
  });

  scenario("from clear to sealed: `none` lets them be read, and sealed at once", async (table) => {
    const { rows, first } = await begin(table);
    const alone = await start(table, { secret: "none" });
    expect(await alone.publishes()).toEqual(kids(rows));
    expect(await table.rows()).toEqual(rows);
    const both = await start(table, { secret: `none,${secret}`, polls: true });
    const sealed = await table.rows();
    expect(sealed.map(isClear)).toEqual([false, false]);
    const asBefore = sealed.map((row, index) => ({ ...row, jwk: rows[index]!.jwk }));
    expect(asBefore).toEqual(rows);
    expect(await both.publishes()).toEqual(kids(rows));
    await table.change(change(1, `jwk = '${first.jwk}'`)); // while it runs, too
    await both.poll();
    expect((await table.rows()).map(isClear)).toEqual([false, false]);
    const without = await start(table, { secret });
    expect(await without.publishes()).toEqual(kids(rows));
    expect(await without.signs()).toBe(first.kid);
  });

  scenario("from old to new: `old,new`, then `new,old`, then `new`", async (table) => {
    const fresh = newSecret();
    const { first, rows } = await begin(table, { secret });
    expect(await refusal(table, { secret: fresh })).toContain(first.kid);
    await start(table, { secret: `${secret},${fresh}`, at: t0 + rotation });
    const changing = await start(table, { secret: `${fresh},${secret}`, at: t0 + 2 * rotation });
    const [, , row3, row4] = (await table.rows()) as [Row, Row, Row, Row];
    expect([await unseal(row3, fresh), await unseal(row4, secret)]).toEqual([undefined, undefined]);
    expect(await unseal(row3, secret)).toBeString();
    expect(await unseal(row4, fresh)).toBeString();
    expect(await changing.signs()).toBe(row3.kid);
    expect(await refusal(table, { secret: fresh, at: t0 + 2 * rotation })).toContain(row3.kid);
    const changed = await start(table, { secret: fresh, at: t0 + 3 * rotation });
    expect(await changed.signs()).toBe(row4.kid);
    expect((await table.rows()).slice(0, 2)).toEqual(rows);
  });

  // --- Polls that fail, used identifiers ---------------------------------------------------------

  for (const [what, breaks, mends] of [
    ["be read", "RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO signing_keys"],
    [
      "be written",
      "RENAME COLUMN generation TO elsewhere",
      "ALTER TABLE signing_keys RENAME COLUMN elsewhere TO generation",
    ],
  ] as const)
    scenario(`keys cannot ${what}: degraded, until they can`, async (table) => {
      const { instance, first, rows } = await begin(table, { polls: true });
      const becomes = async (status: string) =>
        await eventually(status, async () => (await instance.health())[1] === status);
      const reports = (name: string) =>
        instance.running.lines.filter(({ event }) => event === name);
      expect(await instance.health()).toEqual([200, "ok"]);
      if (what === "be written") await table.change(remove(2));
      await table.change(`ALTER TABLE signing_keys ${breaks}`);
      await becomes("degraded");
      expect(await instance.health()).toEqual([200, "degraded"]);
      expect(await instance.publishes()).toContain(first.kid);
      expect(await instance.signs()).toBe(first.kid);
      expect(reports("database away")[0]!["reason"]).toBeString();
      expect(reports("database back")).toEqual([]);
      await table.change(mends);
      await becomes("ok");
      for (let polls = 0; polls < 3; polls++) await instance.poll();
      expect(reports("database back")).toHaveLength(1);
      expect(dates(await table.rows())).toEqual(dates(rows));
    });

  scenario("identifiers are swept a quarter of an hour after they expire", async (table) => {
    const { instance } = await begin(table, { polls: true });
    for (const late of [902, 901, 900, 899, 0])
      await table.change(`INSERT INTO used_jtis VALUES ('late ${late}', ${t0 + 1 - late})`);
    await instance.poll();
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 899", "late 900"]);
    await instance.poll();
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 899"]);
    await start(table, { at: t0 + 902 });
    expect(await table.identifiers("late %")).toEqual([]);
  });

  scenario("a used identifier is kept until nobody accepts it any more", async (table) => {
    const { instance } = await begin(table);
    const kept = async () => {
      const rows = await table.sql`SELECT expires_at FROM used_jtis WHERE expires_at > ${t0}`;
      await table.change("DELETE FROM used_jtis");
      return rows.map((row: { expires_at: unknown }) => Number(row.expires_at) - t0);
    };
    expect((await instance.once()).status).toBe(200);
    expect(await kept()).toEqual([60 + 30]);
    const dpop = await proof(robot, "POST", instance.running.tokenEndpoint, "", { iat: t0 - 5 });
    expect((await instance.token(t0, { dpop })).status).toBe(200);
    expect(await kept()).toEqual([90 - 5]);
  });

  scenario("a table that lost its primary key: 503, for a replay would pass", async (table) => {
    const { instance, first } = await begin(table);
    await table.change("DROP TABLE used_jtis");
    await table.change("CREATE TABLE used_jtis (id TEXT, expires_at BIGINT NOT NULL)");
    const { status, headers, json } = await instance.once();
    expect([status, json.error]).toEqual([503, "temporarily_unavailable"]);
    expect(headers.get("retry-after")).toBe("5");
    expect(await instance.health()).toEqual([200, "degraded"]);
    expect(await instance.signs()).toBe(first.kid);
  });
}

const secretOf = (bytes: number) => Buffer.alloc(bytes, 7).toString("base64url");
test.each([
  ...["x", "None", secretOf(31), secretOf(33), `${secretOf(32)},short`, `${secretOf(31)},none`],
])("KEY_ENCRYPTION_SECRET %s → no start", async (setting) => {
  const said = await refusal(await sqlite(), { secret: setting });
  expect(said).toContain("KEY_ENCRYPTION_SECRET");
  expect(said).not.toContain(setting);
});

// --- Public keys ---------------------------------------------------------------------------------

const members = {
  ...{ ES384: "crv kty x y", ES512: "crv kty x y", ES256: "crv kty x y" },
  ...{ RS256: "e kty n", PS256: "e kty n", EdDSA: "crv kty x", Ed25519: "crv kty x" },
  ...{ "ML-DSA-44": "kty pub", "ML-DSA-65": "kty pub", "ML-DSA-87": "kty pub" },
};

describe("GET jwks", async () => {
  const table = await sqlite();
  const instance = await start(table, { keys: { algorithms: Object.keys(members) } });
  const keys = await instance.jwks();
  const rows = await table.rows();
  await table.close();
  for (const [alg, names] of Object.entries(members))
    test(`RFC 7517 §4, RFC 7638 §3 ${alg} → ${names}, alg, use, the thumbprint as kid`, async () => {
      const own = keys.filter((jwk) => jwk.alg === alg);
      expect(own.map(({ kid }) => kid!)).toEqual(kids(rows.filter((row) => row.alg === alg)));
      expect(own).toHaveLength(2);
      for (const { kid, use, alg: _, ...jwk } of own) {
        expect(Object.keys(jwk).sort().join(" ")).toBe(names);
        expect([kid, use]).toEqual([await jose.calculateJwkThumbprint({ ...jwk, alg }), "sig"]);
        expect(JSON.parse(rows.find((row) => row.kid === kid)!.jwk)).toMatchObject(jwk);
      }
    });
});

test("GET jwks: a member that is not known to be public is not published", async () => {
  const table = await sqlite();
  const { instance, first } = await begin(table, { polls: true });
  const jwk = JSON.stringify({ ...JSON.parse(first.jwk), note: "mine", oth: [], ext: true });
  await table.change(change(1, `jwk = '${jwk}'`));
  await instance.poll();
  const [published] = await instance.jwks();
  expect(Object.keys(published!).sort()).toEqual(["alg", "crv", "kid", "kty", "use", "x", "y"]);
  expect(published!.kid).toBe(first.kid);
  await table.close();
});

// --- SQLite files --------------------------------------------------------------------------------

const mode = (path: string) => (statSync(path).mode & 0o7777).toString(8);

test.each(["sqlite://FILE", "sqlite:FILE", "sqlite://FILE?mode=rwc"])(
  "SQLite, %s: directories 0700, files 0600, WAL",
  async (form) => {
    const directory = join(temporaryDirectory(), "new/keys");
    const umask = process.umask(0);
    const table = new Table(form.replace("FILE", join(directory, "keys.db")));
    await begin(table).finally(() => process.umask(umask));
    expect([mode(dirname(directory)), mode(directory)]).toEqual(["700", "700"]);
    expect(readdirSync(directory).sort()).toEqual(["keys.db", "keys.db-shm", "keys.db-wal"]);
    for (const name of readdirSync(directory)) expect(mode(join(directory, name))).toBe("600");
    const [journal] = await table.sql`PRAGMA journal_mode`;
    expect(Object.values(journal)).toEqual(["wal"]);
    await table.close();
  },
);

/** Which of the files of a database hold the private part of a key. */
const holding = ({ file }: Table, { jwk }: Row) =>
  ["", "-wal"].filter((end) => readFileSync(file + end, "latin1").includes(JSON.parse(jwk).d));

test("SQLite: a key that is revoked, removed or sealed is gone from the files", async () => {
  const table = await sqlite();
  const { instance, rows, first, second } = await begin(table, { polls: true });
  for (const row of rows) expect(holding(table, row)).toEqual([""]); // not in the journal
  await table.change("PRAGMA secure_delete = ON"); // as an operator's program deletes
  await table.change(remove(1));
  await instance.poll();
  await eventually("the revoked key is gone", () => holding(table, first).length === 0);
  await instance.poll(second.removed_at + 899);
  await instance.poll(second.removed_at + 900);
  const left = await table.rows();
  expect(kids(left)).not.toContain(second.kid);
  await instance.running.stop();
  const sealing = await start(table, { at: instance.at, secret: `${newSecret()},none` });
  expect((await table.rows()).map(isClear)).not.toContain(true);
  for (const row of [second, ...left]) expect(holding(table, row)).toEqual([]);
  expect(await sealing.publishes()).toEqual(kids(left));
  await table.close();
});

test("SQLite: one that can only be read signs, and is degraded", async () => {
  const table = await sqlite();
  const { first } = await begin(table);
  const reading = new Table(`${table.url}?mode=ro`);
  for (const secret of ["", `${newSecret()},none`]) {
    const instance = await start(reading, { secret });
    expect(await instance.signs()).toBe(first.kid);
    expect(await instance.health()).toEqual([200, "degraded"]);
    expect((await instance.once()).status).toBe(503);
  }
  expect(await refusal(reading, { at: t0 + 2 * rotation })).toContain(table.file);
  await reading.close();
  await table.close();
});

/** What stands at the place of the database, and stays as it was. */
const noDatabase = "This is no database. ".repeat(500);
const wrongFiles: [string, string, (file: string) => void][] = [
  ["is no database", "", (file) => writeFileSync(file, noDatabase)],
  ["is a directory", "", (file) => mkdirSync(file)],
  ["would be in a file", "/keys.db", (file) => writeFileSync(file, noDatabase)],
  [
    "is damaged",
    "",
    (file) => writeFileSync(file, Buffer.from("SQLite format 3\0").toString() + noDatabase),
  ],
];
test.each(wrongFiles)("SQLite: a file that %s → no start, it is named", async (_, end, prepare) => {
  const file = join(temporaryDirectory(), "wrong.db");
  prepare(file);
  const isFile = statSync(file).isFile();
  const content = isFile && readFileSync(file);
  expect(await refusal(new Table(`sqlite://${file}${end}`))).toContain(file);
  if (isFile) expect(readFileSync(file)).toEqual(content as Buffer<ArrayBuffer>);
});
