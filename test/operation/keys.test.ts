/**
 * The life of a signing key, seen by clients, by APIs and by an operator who looks into the table.
 * Time is a variable here; an instance polls every few milliseconds only where a test says so.
 */

import { describe, expect, test } from "bun:test";
import { chmodSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { randomBytes } from "node:crypto";
import { dirname, join } from "node:path";
import * as jose from "jose";
import type { AuthorizationServerSettings } from "../../config.ts";
import { authorizationServer } from "../../config.ts";
import { engines, eventually, type Row, sqlite, Table } from "../support/databases.ts";
import { type Answer, basic, post, send } from "../support/http.ts";
import { assertion, assertionType, key, proof } from "../support/jwt.ts";
import { temporaryDirectory } from "../support/programs.ts";
import { api, idp, reservePort } from "../support/servers.ts";

const day = 86_400;
const rotation = authorizationServer.signingKeys.rotationSeconds;
const retention = authorizationServer.signingKeys.retentionSeconds;
/** When every test begins, in seconds: nothing here looks at the clock on the wall. */
const t0 = 2_000_000_000;
const newSecret = () => randomBytes(32).toString("base64url");

const robot = await key();
const other = await key();
const clients: AuthorizationServerSettings["clients"] = [
  ...authorizationServer.clients,
  {
    ...{ client_id: "robot", jwks: { keys: [robot.publicJwk] }, scope: "api1" },
    ...{ grant_types: ["client_credentials"], access_token_lifetime_seconds: 60 },
  },
];

// --- Instances -----------------------------------------------------------------------------------

type SigningKeys = AuthorizationServerSettings["signingKeys"];
interface Options {
  at?: number;
  secret?: string;
  keys?: Partial<SigningKeys>;
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
    const pollSeconds = polls ? 0.02 : 20 * day;
    this.running = await idp({
      ...{ databaseUrl: this.#table.url, clients, keyEncryptionSecret: secret },
      signingKeys: { ...authorizationServer.signingKeys, pollSeconds, ...keys },
      ...{ databaseWaitSeconds: 0, clock: () => this.at * 1000, ...more },
    });
    this.#table.users.push(this.running);
    return this;
  }

  async token(at = this.at): Promise<Answer> {
    this.at = at;
    const authorization = basic("client", "secret");
    const { tokenEndpoint } = this.running;
    return await post(tokenEndpoint, { grant_type: "client_credentials" }, { authorization });
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

  async jwks(at = this.at): Promise<jose.JWK[]> {
    this.at = at;
    const { json } = await send(`${this.running.url}/.well-known/openid-configuration/jwks`);
    return json.keys;
  }

  async publishes(at = this.at): Promise<string[]> {
    return (await this.jwks(at)).map(({ kid }) => kid!);
  }

  async health(): Promise<[number, string]> {
    const { status, json } = await send(`${this.running.url}/health`);
    return [status, json.status];
  }

  events(name: string): Record<string, any>[] {
    return this.running.lines.filter(({ event }) => event === name);
  }

  /** Moves the clock on, and waits until a poll at that time has swept what it alone can sweep. */
  async poll(at = this.at + 1): Promise<void> {
    const id = `mark ${crypto.randomUUID()}`;
    await this.#table.change(
      `INSERT INTO used_jtis (id, expires_at) VALUES ('${id}', ${at - 901})`,
    );
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
const dates = (rows: Row[]) =>
  rows.map((row) => [row.generation, row.signs_from - t0, row.signs_until - t0]);
const change = (generation: number, assignment: string) =>
  `UPDATE signing_keys SET ${assignment} WHERE generation = ${generation}`;
const remove = (generation: number) => `DELETE FROM signing_keys WHERE generation = ${generation}`;
const isClear = ({ jwk }: Row) => jwk.startsWith("{");
const headerOf = ({ jwk }: Row) => jose.decodeProtectedHeader(jwk);

for (const { engine, make, isMissing } of engines) {
  const scenario = (name: string, run: (table: Table) => Promise<void>) =>
    test.skipIf(isMissing)(`signing keys, ${engine}: ${name}`, async () => {
      const table = await make();
      await run(table).finally(() => table.close());
    });

  // --- Life --------------------------------------------------------------------------------------

  scenario("the first start makes two; the second follows the first", async (table) => {
    const { instance, rows, first } = await begin(table);
    expect(dates(rows)).toEqual([
      [1, 0, rotation],
      [2, rotation, 2 * rotation],
    ]);
    expect(rows.map((row) => row.removed_at - row.signs_until)).toEqual([retention, retention]);
    expect(await instance.publishes()).toEqual(kids(rows));
    expect(await instance.signs()).toBe(first.kid);
    const made = instance.events("key made").map(({ kid, alg }) => [kid, alg]);
    expect(made).toEqual(rows.map(({ kid, alg }) => [kid, alg]));
    const again = await start(table);
    expect(again.events("key made")).toEqual([]);
    expect(await table.rows()).toEqual(rows);
  });

  scenario("one signs until signs_until, and is public until removed_at", async (table) => {
    const { instance, first, second } = await begin(table);
    const signs = (seconds: number) => instance.signs(t0 + seconds);
    expect(await signs(rotation - 1)).toBe(first.kid);
    expect(await signs(rotation)).toBe(second.kid);
    expect(await signs(2 * rotation - 1)).toBe(second.kid);
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

  scenario("four rotations: one signs, one follows, those of old tokens stay", async (table) => {
    const { instance, rows } = await begin(table, { polls: true });
    for (let turn = 1; turn <= 4; turn++) {
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
      await eventually("it says so", () =>
        instance.events("key removed").some((line) => line["kid"] === kid),
      );
    }
    expect(instance.events("key removed")).toHaveLength(4);
    expect(instance.events("key skipped")).toEqual([]);
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

  for (const [seconds, deleted] of [
    [900, true],
    [901, false],
  ] as const)
    scenario(`a clock that moves ${seconds} s in one poll deletes: ${deleted}`, async (table) => {
      const { instance, first } = await begin(table, { polls: true });
      await instance.poll(first.removed_at + 850);
      await instance.poll(first.removed_at + 850 + seconds);
      expect(kids(await table.rows()).includes(first.kid)).toBe(!deleted);
    });

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
      expect(dates((await table.rows()).slice(2))).toEqual([[3, 2 * rotation, 3 * rotation]]);
      await table.change(remove(3));
      const at = t0 + 2 * rotation;
      const late = await after(at);
      const rows = (await table.rows()).slice(-2);
      expect(dates(rows)).toEqual([
        [3, 2 * rotation, 3 * rotation],
        [4, 3 * rotation, 4 * rotation],
      ]);
      expect(await late.signs()).toBe(rows[0]!.kid);
      // What the last one has signed stays valid.
      expect(await late.publishes()).toEqual([second.kid, ...kids(rows)]);
      const later = await after(t0 + 9 * rotation);
      const [signing] = (await table.rows()).slice(-2);
      expect(dates([signing!])).toEqual([[5, 9 * rotation, 10 * rotation]]);
      expect(await later.signs()).toBe(signing!.kid);
    });

  scenario("clocks some seconds apart: the same keys, public before they sign", async (table) => {
    const { instance: right, first, second } = await begin(table, { polls: true });
    const early = await start(table, { at: t0 - 5 });
    expect(await early.signs()).toBe(first.kid);
    const ahead = await start(table, { at: t0 + rotation + 2 });
    await right.poll(t0 + rotation - 3);
    const behind = await start(table, { at: t0 + rotation - 8 });
    const rows = await table.rows();
    expect(dates(rows)[2]).toEqual([3, 2 * rotation, 3 * rotation]);
    for (const one of [ahead, right, behind]) expect(await one.publishes()).toEqual(kids(rows));
    expect(await ahead.signs()).toBe(second.kid);
    expect(await right.signs()).toBe(first.kid);
    expect(await behind.signs()).toBe(first.kid);
  });

  scenario("keys made by a clock that is ahead sign here at once", async (table) => {
    const { rows, first } = await begin(table, { at: t0 + 20 });
    const right = await start(table);
    expect(await right.signs()).toBe(first.kid);
    expect(await table.rows()).toEqual(rows);
  });

  scenario("instances that start or rotate together make one row each time", async (table) => {
    const starting = [1, 2, 3, 4].map(async () => await start(table));
    const instances = await Promise.all(starting);
    const rows = await table.rows();
    expect(dates(rows).map(([generation]) => generation)).toEqual([1, 2]);
    for (const one of instances) expect(await one.publishes()).toEqual(kids(rows));
    const made = instances.flatMap((one) => one.events("key made"));
    expect(made.map(({ kid }) => kid).sort()).toEqual(kids(rows).sort());
    const rotating = [0, 1, 2, 3].map(async (s) => await start(table, { at: t0 + rotation + s }));
    for (const one of await Promise.all(rotating))
      expect(await one.publishes()).toEqual(kids(await table.rows()));
    expect(await table.rows()).toHaveLength(3);
  });

  scenario(
    "an API that fetched the keys a rotation ago knows the one that signs",
    async (table) => {
      const reserved = reservePort();
      const url = `http://127.0.0.1:${reserved.port}`;
      const scopes = [{ scope: "api1", description: "My API", resource: url }];
      const { instance } = await begin(table, { polls: true, more: { scopes } });
      const clock = () => instance.at * 1000;
      const times = { refreshSeconds: 20 * day, coolDownSeconds: 20 * day };
      const rules = {
        ...times,
        keepKeysSeconds: 9 * rotation,
        resource: url,
        reusePort: true,
        clock,
      };
      const protectedApi = await api(instance.running.url, rules);
      table.users.push(protectedApi);
      reserved.release();
      const call = async () => {
        const { access_token } = (await instance.token()).json;
        const headers = { authorization: `Bearer ${access_token}` };
        return (await send(`${url}/identity`, { headers })).status;
      };
      expect(await call()).toBe(200);
      const first = await instance.signs();
      instance.at = t0 + 10 * day; // its keys are not old
      await instance.poll(t0 + rotation);
      expect(await instance.signs()).not.toBe(first!);
      await instance.running.server.stop(true); // and it cannot fetch them again
      expect(instance.events("token issued").length).toBeGreaterThan(0);
    },
  );

  // --- Rows that an operator touches -------------------------------------------------------------

  scenario(
    "the row that signs is deleted: its successor signs, one more follows",
    async (table) => {
      const { instance, first, second } = await begin(table, { polls: true });
      await table.change(remove(1));
      await instance.poll(t0 + 10);
      const rows = await table.rows();
      expect(rows[0]).toEqual(second);
      expect(dates(rows)[1]).toEqual([3, 2 * rotation, 3 * rotation]);
      await eventually("it signs", async () => (await instance.signs()) === second.kid);
      await eventually("both are public", async () =>
        Bun.deepEquals(await instance.publishes(), kids(rows)),
      );
      expect(instance.events("key removed").map(({ kid }) => kid)).toEqual([first.kid]);
    },
  );

  scenario("the row of the successor is deleted: another is made in its place", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    await table.change(remove(2));
    await instance.poll();
    const rows = await table.rows();
    expect(dates(rows)).toEqual(dates([first, second]));
    expect([rows[0]!.kid === first.kid, rows[1]!.kid === second.kid]).toEqual([true, false]);
    expect(await instance.publishes()).toEqual(kids(rows));
  });

  scenario("the row of one that has signed is deleted: only that is gone", async (table) => {
    const { instance, first } = await begin(table, { polls: true });
    await instance.poll(t0 + rotation);
    const rows = await table.rows();
    expect(rows[0]).toEqual(first);
    await table.change(remove(1));
    await instance.poll();
    expect(await table.rows()).toEqual(rows.slice(1));
    expect(await instance.publishes()).toEqual(kids(rows.slice(1)));
  });

  scenario("all rows are deleted: a new one signs at once", async (table) => {
    const { instance, rows } = await begin(table, { polls: true });
    instance.at = t0 + day;
    await instance.poll();
    await table.change("DELETE FROM signing_keys");
    await instance.poll();
    const after = await table.rows();
    expect(dates(after).map((row) => row.slice(0, 2))).toEqual([
      [1, day],
      [2, day + rotation],
    ]);
    expect(await instance.publishes()).toEqual(kids(after));
    expect(await instance.signs()).toBe(after[0]!.kid);
    expect(kids(rows)).not.toContain(after[0]!.kid);
  });

  scenario("one that only overlaps the signing one is no successor", async (table) => {
    const { instance, second } = await begin(table, { polls: true });
    await table.change(change(2, `signs_from = ${t0 + rotation - 1}`));
    await instance.poll();
    expect(dates(await table.rows())).toEqual([
      [1, 0, rotation],
      [2, rotation - 1, 2 * rotation],
      [3, rotation, 2 * rotation],
    ]);
    expect(await instance.signs(t0 + rotation)).toBe(second.kid);
  });

  scenario("they sign in the order of signs_from, then of generation", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    await table.change(change(1, "generation = 3"));
    await instance.poll();
    expect(await instance.publishes()).toEqual([first.kid, second.kid]);
    await table.change(`UPDATE signing_keys SET signs_from = ${t0 - 9}`);
    await instance.poll();
    await eventually("the earlier generation signs", async () => {
      return (await instance.signs()) === second.kid;
    });
  });

  scenario(
    "a row in clear counts as its dates stand; expires_in is never negative",
    async (table) => {
      const { instance, first, second } = await begin(table, { polls: true });
      expect((await instance.token()).json.expires_in).toBe(3600);
      const end = t0 + 100;
      await table.change(change(1, `signs_until = ${end}, removed_at = ${end}`));
      await instance.poll();
      await eventually("it is seen", async () => (await instance.token()).json.expires_in === 100);
      const { access_token, expires_in } = (await instance.token(end - 1)).json;
      const { exp, iat } = jose.decodeJwt(access_token);
      expect([exp, iat, expires_in]).toEqual([end, end - 1, 1]);
      expect(jose.decodeProtectedHeader(access_token).kid).toBe(first.kid);
      expect(await instance.signs(end)).toBe(second.kid);
      expect(await instance.publishes()).not.toContain(first.kid);
    },
  );

  for (const [what, assignment] of [
    ["removed before it stops to sign", `removed_at = ${t0 + rotation - 1}`],
    ["removed long ago", `removed_at = ${t0 - 1}`],
    ["over before it begins", `signs_until = signs_from`],
  ])
    scenario(`a row that is ${what} signs nothing`, async (table) => {
      const { instance, first, second } = await begin(table, { polls: true });
      await table.change(change(1, assignment!));
      await instance.poll();
      expect(await instance.signs()).toBe(second.kid);
      expect((await instance.token()).json.expires_in).toBe(3600);
      expect(instance.events("key skipped")[0]!["kid"]).toBe(first.kid);
    });

  // --- Several algorithms, other settings --------------------------------------------------------

  scenario("several algorithms: two keys of each, the first one signs", async (table) => {
    const algorithms = ["Ed25519", "ES256", "ML-DSA-44"];
    const { instance } = await begin(table, { keys: { algorithms }, polls: true });
    const of = async (alg: string) => (await table.rows()).filter((row) => row.alg === alg);
    for (const alg of algorithms) expect(dates(await of(alg))).toHaveLength(2);
    await instance.poll(t0 + rotation);
    for (const alg of algorithms)
      expect(dates(await of(alg))[2]).toEqual([3, 2 * rotation, 3 * rotation]);
    expect(await instance.signs()).toBe((await of("Ed25519"))[1]!.kid);
    expect((await instance.publishes()).sort()).toEqual(kids(await table.rows()).sort());
  });

  scenario("a change of algorithm: second, then first, then alone", async (table) => {
    const { instance: old, first, rows } = await begin(table, { polls: true });
    const second = await start(table, { keys: { algorithms: ["ES256", "Ed25519"] } });
    const all = await table.rows();
    const [ed1] = all.filter(({ alg }) => alg === "Ed25519");
    expect(all).toHaveLength(4);
    expect((await second.publishes()).sort()).toEqual(kids(all).sort());
    expect(await second.signs()).toBe(first.kid);
    // An instance that does not know the algorithm yet publishes its keys all the same.
    await old.poll();
    expect((await old.publishes()).sort()).toEqual(kids(all).sort());
    await old.running.stop();
    const changed = await start(table, { keys: { algorithms: ["Ed25519", "ES256"] } });
    expect(await changed.signs()).toBe(ed1!.kid);
    const alone = await start(table, { keys: { algorithms: ["Ed25519"] }, polls: true });
    expect(await alone.signs()).toBe(ed1!.kid);
    for (const at of [first.removed_at - 1, first.removed_at]) {
      await alone.poll(at);
      const es256 = (await alone.jwks()).filter(({ alg }) => alg === "ES256");
      const expected = kids(rows.filter(({ removed_at }) => removed_at > at));
      expect(es256.map(({ kid }) => kid!)).toEqual(expected);
    }
    expect((await table.rows()).filter(({ alg }) => alg === "ES256")).toEqual(rows);
  });

  scenario("another rotation and retention: no key gets other dates", async (table) => {
    const { first, second } = await begin(table);
    const keys = { rotationSeconds: 70 * day, retentionSeconds: 20 * day };
    const instance = await start(table, { keys, polls: true });
    await instance.poll(t0 + rotation - 1);
    expect(await table.rows()).toEqual([first, second]);
    await instance.poll(t0 + rotation);
    const [, , third] = await table.rows();
    expect(dates([third!])).toEqual([[3, 2 * rotation, 2 * rotation + 70 * day]]);
    expect(third!.removed_at).toBe(third!.signs_until + 20 * day);
    expect((await table.rows()).slice(0, 2)).toEqual([first, second]);
  });

  // --- Rows that cannot be opened ----------------------------------------------------------------

  const damage = {
    "no JSON": "{garbled",
    "no key": "{}",
    "a damaged key": JSON.stringify({ kty: "EC", crv: "P-256", x: "AA", y: "AA" }),
    "another key": JSON.stringify(other.privateJwk),
    "a sealed key": "e30..AA.AA.AA",
    nothing: "",
  };
  for (const [what, jwk] of Object.entries(damage))
    scenario(`the row that signs holds ${what}: no start, no row changes`, async (table) => {
      const { first } = await begin(table);
      await table.change(change(1, `jwk = '${jwk}'`));
      const rows = await table.rows();
      expect(await refusal(table)).toContain(first.kid);
      expect(await refusal(table, { at: t0 + rotation - 1 })).toContain(first.kid);
      expect(await table.rows()).toEqual(rows);
      expect(await refusal(table, { at: t0 + rotation })).toBe("it started");
    });

  scenario("that of a second algorithm cannot be opened: no row changes", async (table) => {
    const keys = { algorithms: ["ES256", "Ed25519"] };
    await begin(table, { keys });
    await table.change(`${remove(2)} AND alg = 'ES256'`);
    await table.change(`${change(1, "jwk = ''")} AND alg = 'Ed25519'`);
    const rows = await table.rows();
    const [unusable] = rows.filter(({ alg }) => alg === "Ed25519");
    expect(await refusal(table, { keys })).toContain(unusable!.kid);
    expect(await table.rows()).toEqual(rows);
    expect(await refusal(table)).toBe("it started");
  });

  scenario("those before and after cannot be opened: it starts, and numbers on", async (table) => {
    const { second } = await begin(table);
    await start(table, { at: t0 + rotation });
    await table.change(`UPDATE signing_keys SET jwk = 'garbled' WHERE generation <> 2`);
    const instance = await start(table, { at: t0 + rotation });
    const rows = await table.rows();
    expect(dates(rows)[3]).toEqual([4, 2 * rotation, 3 * rotation]);
    expect(await instance.signs()).toBe(second.kid);
    expect(await instance.publishes()).toEqual([second.kid, rows[3]!.kid]);
  });

  scenario("while it runs, it is reported and passed over, and comes back", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    await table.change(change(1, "jwk = 'garbled'"));
    await instance.poll();
    expect(await instance.signs()).toBe(second.kid);
    const rows = await table.rows();
    expect(rows.slice(0, 2)).toEqual([{ ...first, jwk: "garbled" }, second]);
    expect(dates(rows)[2]).toEqual([3, 2 * rotation, 3 * rotation]);
    expect(await instance.publishes()).toEqual(kids(rows.slice(1)));
    const [line] = instance.events("key skipped");
    expect([line!["kid"], typeof line!["reason"]]).toEqual([first.kid, "string"]);
    await table.change(change(1, `jwk = '${first.jwk}'`));
    await instance.poll();
    expect(await instance.signs()).toBe(first.kid);
    expect(await instance.publishes()).toEqual(kids(rows));
  });

  // --- Polls that fail, used identifiers ---------------------------------------------------------

  scenario("a poll that cannot read: degraded, until one can", async (table) => {
    const { instance, rows } = await begin(table, { polls: true });
    const becomes = (status: string) =>
      eventually(status, async () => (await instance.health())[1] === status);
    expect(await instance.health()).toEqual([200, "ok"]);
    await table.change("ALTER TABLE signing_keys RENAME TO elsewhere");
    await becomes("degraded");
    expect(await instance.health()).toEqual([200, "degraded"]);
    expect(await instance.publishes()).toEqual(kids(rows));
    expect(await instance.signs()).toBe(rows[0]!.kid);
    expect(instance.events("database away")[0]!["reason"]).toContain("signing_keys");
    expect(instance.events("database back")).toEqual([]);
    await table.change("ALTER TABLE elsewhere RENAME TO signing_keys");
    await becomes("ok");
    for (let polls = 0; polls < 3; polls++) await instance.poll();
    expect(instance.events("database back")).toHaveLength(1);
  });

  scenario("a key cannot be written: degraded, and the one that signs goes on", async (table) => {
    const { instance, first, second } = await begin(table, { polls: true });
    await table.change(remove(2));
    await table.change("ALTER TABLE signing_keys RENAME COLUMN generation TO elsewhere");
    const becomes = (status: string) =>
      eventually(status, async () => (await instance.health())[1] === status);
    await becomes("degraded");
    expect(await instance.signs()).toBe(first.kid);
    await table.change("ALTER TABLE signing_keys RENAME COLUMN elsewhere TO generation");
    await becomes("ok");
    expect(dates(await table.rows())).toEqual(dates([first, second]));
  });

  scenario("identifiers are swept a quarter of an hour after they expire", async (table) => {
    const { instance } = await begin(table, { polls: true });
    for (const late of [902, 901, 900, 899, 0])
      await table.change(`INSERT INTO used_jtis VALUES ('late ${late}', ${t0 - late})`);
    await instance.poll();
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 899", "late 900"]);
    await instance.poll(t0 + 1);
    expect(await table.identifiers("late %")).toEqual(["late 0", "late 899"]);
    const start2 = await start(table, { at: t0 + 901 });
    expect(await table.identifiers("late %")).toEqual([]);
    expect((await start2.once()).status).toBe(200);
  });

  scenario("a used identifier is kept until nobody accepts it any more", async (table) => {
    const { instance } = await begin(table);
    const used = async () =>
      await table.sql`SELECT expires_at FROM used_jtis WHERE expires_at > ${t0}`;
    expect((await instance.once()).status).toBe(200);
    expect((await used()).map((row: any) => Number(row.expires_at) - t0)).toEqual([60 + 30]);
    await table.change("DELETE FROM used_jtis");
    const dpop = await proof(robot, "POST", instance.running.tokenEndpoint, "", { iat: t0 - 5 });
    const headers = { authorization: basic("client", "secret"), dpop };
    const { tokenEndpoint } = instance.running;
    const { status } = await post(tokenEndpoint, { grant_type: "client_credentials" }, headers);
    expect(status).toBe(200);
    expect((await used()).map((row: any) => Number(row.expires_at) - t0)).toEqual([90 - 5]);
  });

  scenario(
    "a table without its primary key: what is used once is 503, not replayed",
    async (table) => {
      const { instance, first } = await begin(table);
      await table.change("DROP TABLE used_jtis");
      await table.change("CREATE TABLE used_jtis (id TEXT, expires_at BIGINT NOT NULL)");
      const { status, headers, json } = await instance.once();
      expect([status, json.error]).toEqual([503, "temporarily_unavailable"]);
      expect(headers.get("retry-after")).toBe("5");
      expect(await instance.health()).toEqual([200, "degraded"]);
      expect(await instance.signs()).toBe(first.kid);
    },
  );

  // --- The key encryption secret -----------------------------------------------------------------

  scenario(
    "without a secret the rows hold private JWKs, whose thumbprint is the kid",
    async (table) => {
      for (const { jwk, kid } of (await begin(table)).rows) {
        const members = JSON.parse(jwk);
        expect(Object.keys(members).sort()).toEqual(["crv", "d", "kty", "x", "y"]);
        expect(await jose.calculateJwkThumbprint(members)).toBe(kid);
      }
    },
  );

  scenario("with one they are JWEs that carry kid and dates; others open none", async (table) => {
    const secret = newSecret();
    const { rows, first } = await begin(table, { secret });
    for (const row of rows) {
      const { kid, signs_from, signs_until, removed_at, jwk } = row;
      const sealed = { kid, signs_from, signs_until, removed_at };
      expect(headerOf(row)).toMatchObject({ alg: "dir", enc: "A256GCM", ...sealed });
      const { plaintext } = await jose.compactDecrypt(jwk, Buffer.from(secret, "base64url"));
      const members = JSON.parse(new TextDecoder().decode(plaintext));
      expect(Object.keys(members).sort()).toEqual(["crv", "d", "kty", "x", "y"]);
    }
    const instance = await start(table, { secret: `${secret},` });
    expect(await instance.publishes()).toEqual(kids(rows));
    for (const wrong of [newSecret(), "", "none", `${newSecret()},none`]) {
      const said = await refusal(table, { secret: wrong });
      expect(said).toContain(first.kid);
      expect(said).toContain("KEY_ENCRYPTION_SECRET");
    }
    expect(await table.rows()).toEqual(rows);
  });

  scenario("from clear to sealed: `none` lets them be read, and sealed at once", async (table) => {
    const { rows, first } = await begin(table);
    const secret = newSecret();
    expect(await refusal(table, { secret })).toContain(first.kid);
    expect(await table.rows()).toEqual(rows);
    const alone = await start(table, { secret: "none" });
    expect(await alone.publishes()).toEqual(kids(rows));
    expect(await table.rows()).toEqual(rows);
    const both = await start(table, { secret: `none,${secret}`, polls: true });
    const sealed = await table.rows();
    expect(sealed.map(isClear)).toEqual([false, false]);
    expect(sealed.map(({ jwk: _, ...row }) => row)).toEqual(rows.map(({ jwk: _, ...row }) => row));
    expect(await both.publishes()).toEqual(kids(rows));
    // An instance that was not told yet passes over what it cannot open, and seals none.
    await table.change(change(1, `jwk = '${first.jwk}'`));
    await both.poll();
    expect((await table.rows()).map(isClear)).toEqual([false, false]);
    const without = await start(table, { secret });
    expect(await without.publishes()).toEqual(kids(rows));
    expect(await without.signs()).toBe(first.kid);
  });

  scenario("from old to new: `old,new`, then `new,old`, then `new`", async (table) => {
    const [old, fresh] = [newSecret(), newSecret()];
    const { first, rows } = await begin(table, { secret: old });
    const opens = async (secret: string, { jwk }: Row) =>
      await jose.compactDecrypt(jwk, Buffer.from(secret, "base64url")).then(
        () => true,
        () => false,
      );
    expect(await refusal(table, { secret: fresh })).toContain(first.kid);
    await start(table, { secret: `${old},${fresh}`, at: t0 + rotation });
    expect(await opens(old, (await table.rows())[2]!)).toBe(true);
    const changing = await start(table, { secret: `${fresh},${old}`, at: t0 + 2 * rotation });
    const [, , third, fourth] = await table.rows();
    expect([await opens(old, third!), await opens(fresh, fourth!)]).toEqual([true, true]);
    expect(await changing.signs()).toBe(third!.kid);
    expect(await refusal(table, { secret: fresh, at: t0 + 2 * rotation })).toContain(third!.kid);
    const changed = await start(table, { secret: fresh, at: t0 + 3 * rotation });
    expect(await changed.signs()).toBe(fourth!.kid);
    expect((await table.rows()).slice(0, 2)).toEqual(rows);
  });

  for (const [what, tamper] of Object.entries({
    "signs longer": () => change(1, `signs_until = signs_until + 9, removed_at = removed_at + 9`),
    "signs earlier": () => change(1, "signs_from = signs_from - 9"),
    "is public longer": () => change(1, "removed_at = removed_at + 9"),
    "has another kid": () => change(1, "kid = 'another'"),
    "has another algorithm": () => change(1, "alg = 'ES384'"),
    "holds the other key": ([, second]: Row[]) => change(1, `jwk = '${second!.jwk}'`),
    "holds the other key and its kid": ([, second]: Row[]) =>
      change(1, `jwk = '${second!.jwk}', kid = '${second!.kid}'`),
  }))
    scenario(`a sealed row that ${what} is passed over, and no start takes it`, async (table) => {
      const secret = newSecret();
      const { instance, rows, second } = await begin(table, { secret, polls: true });
      await table.change(tamper(rows));
      await instance.poll();
      expect(await instance.signs()).toBe(second.kid);
      const made = (await table.rows()).find(({ generation }) => generation === 3)!;
      expect((await instance.publishes()).sort()).toEqual([second.kid, made.kid].sort());
      expect(instance.events("key skipped").length).toBeGreaterThan(0);
      if (what !== "has another algorithm")
        expect(await refusal(table, { secret })).toContain("KEY_ENCRYPTION_SECRET");
    });

  scenario("a planted row, in clear or sealed otherwise, is passed over", async (table) => {
    const secret = newSecret();
    const { instance, rows, first, second } = await begin(table, { secret, polls: true });
    const { kid: _kid, alg: _alg, ...jwk } = other.privateJwk;
    const kid = await jose.calculateJwkThumbprint(jwk);
    const row = { ...first, kid, signs_from: t0 - 9 };
    const header = { kid, key_alg: "ES256", signs_from: t0 - 9 };
    const { signs_until, removed_at } = first;
    const sealedAs = async (alg: string, enc: string) =>
      await new jose.CompactEncrypt(Buffer.from(JSON.stringify(jwk)))
        .setProtectedHeader({ alg, enc, ...header, signs_until, removed_at })
        .encrypt(Buffer.from(secret, "base64url"));
    const planted = [
      JSON.stringify(jwk),
      await sealedAs("dir", "A128CBC-HS256"),
      await sealedAs("A256GCMKW", "A256GCM"),
    ];
    for (const [index, text] of planted.entries()) {
      const plant = { ...row, generation: 7 + index, jwk: text };
      await table.sql`INSERT INTO signing_keys ${table.sql(plant)}`;
    }
    await instance.poll();
    expect(await instance.publishes()).toEqual([first.kid, second.kid]);
    expect(await instance.signs()).toBe(first.kid);
    // The same row, sealed as it should be, is a key: so it was the sealing that was refused.
    const proper = await sealedAs("dir", "A256GCM");
    await table.change(change(7, `jwk = '${proper}'`));
    await instance.poll();
    expect(await instance.signs()).toBe(kid);
    expect((await table.rows()).slice(0, 2)).toEqual(rows);
  });

  scenario("a row in clear whose kid is not its thumbprint is passed over", async (table) => {
    const { instance, second } = await begin(table, { polls: true });
    await table.change(change(1, "kid = 'another'"));
    await instance.poll();
    expect(await instance.signs()).toBe(second.kid);
    expect(await refusal(table)).toContain("another");
  });
}

describe("KEY_ENCRYPTION_SECRET", () => {
  const of = (bytes: number) => Buffer.alloc(bytes, 7).toString("base64url");
  for (const secret of [of(31), of(33), "x", `${of(32)},short`, `${of(31)},none`, "None"])
    test(`of ${secret.length} characters ending in ${secret.slice(-4)} → no start`, async () => {
      const said = await refusal(await sqlite(), { secret });
      expect(said).toContain("KEY_ENCRYPTION_SECRET");
      expect(said).not.toContain(secret);
    });
});

// --- Public keys ---------------------------------------------------------------------------------

const members = {
  ES384: "crv kty x y",
  ES512: "crv kty x y",
  RS256: "e kty n",
  PS256: "e kty n",
  EdDSA: "crv kty x",
  Ed25519: "crv kty x",
  "ML-DSA-44": "kty pub",
  "ML-DSA-65": "kty pub",
  "ML-DSA-87": "kty pub",
  ES256: "crv kty x y",
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

for (const form of ["sqlite://FILE", "sqlite:FILE", "sqlite://FILE?mode=rwc"])
  test(`SQLite, ${form}: directories 0700, files 0600, WAL, emptied after an insert`, async () => {
    const directory = join(temporaryDirectory(), "new/keys");
    const file = join(directory, "keys.db");
    const umask = process.umask(0);
    const table = new Table(form.replace("FILE", file));
    await begin(table).finally(() => process.umask(umask));
    expect([mode(dirname(directory)), mode(directory)]).toEqual(["700", "700"]);
    expect(readdirSync(directory).sort()).toEqual(["keys.db", "keys.db-shm", "keys.db-wal"]);
    for (const name of readdirSync(directory)) expect(mode(join(directory, name))).toBe("600");
    const [journal] = await table.sql`PRAGMA journal_mode`;
    expect(Object.values(journal)).toEqual(["wal"]);
    await table.close();
  });

test("SQLite: an insert leaves no private key in the journal", async () => {
  const table = await sqlite();
  await start(table);
  expect(statSync(`${table.file}-wal`).size).toBeLessThan(readFileSync(table.file).length);
  const rows = await table.rows();
  const journal = readFileSync(`${table.file}-wal`, "latin1");
  for (const { jwk } of rows) expect(journal).not.toContain(JSON.parse(jwk).d);
  for (const { jwk } of rows)
    expect(readFileSync(table.file, "latin1")).toContain(JSON.parse(jwk).d);
  await table.close();
});

/** Whether the files of a database hold a text: in the file itself, or in its journal. */
const holds = (table: Table, text: string) =>
  [table.file, `${table.file}-wal`].some((file) => readFileSync(file, "latin1").includes(text));

test("SQLite: a key that is revoked, removed or sealed is gone from the files", async () => {
  const table = await sqlite();
  const { instance, first, second } = await begin(table, { polls: true });
  const privatePart = ({ jwk }: Row): string => JSON.parse(jwk).d;
  expect(holds(table, privatePart(first))).toBe(true);
  // As an operator's program deletes that overwrites what it deletes.
  await table.change("PRAGMA secure_delete = ON");
  await table.change(remove(1));
  await instance.poll();
  await eventually("the revoked key is gone", () => !holds(table, privatePart(first)));
  await instance.poll(second.removed_at + 899);
  await instance.poll(second.removed_at + 900);
  const rows = await table.rows();
  expect(kids(rows)).not.toContain(second.kid);
  await instance.running.stop();
  const sealing = await start(table, { at: instance.at, secret: `${newSecret()},none` });
  expect((await table.rows()).map(isClear)).not.toContain(true);
  for (const row of [second, ...rows]) expect(holds(table, privatePart(row))).toBe(false);
  expect(await sealing.publishes()).toEqual(kids(rows));
  await table.close();
});

test("SQLite: one that can only be read signs, and is degraded", async () => {
  const table = await sqlite();
  const { first } = await begin(table);
  const reading = new Table(`${table.url}?mode=ro`);
  const instance = await start(reading);
  expect(await instance.signs()).toBe(first.kid);
  expect(await instance.health()).toEqual([200, "degraded"]);
  expect((await instance.once()).status).toBe(503);
  expect(await refusal(reading, { at: t0 + 2 * rotation })).toContain(table.file);
  await reading.close();
  await table.close();
});

describe("SQLite: a start that fails names the file, and leaves it as it was", () => {
  const content = "This is no database. ".repeat(500);
  for (const [what, prepare] of Object.entries({
    "not a database": (file: string) => writeFileSync(file, content),
    "a directory": (file: string) => mkdirSync(file),
    "in a directory that is a file": (file: string) => {
      chmodSync(dirname(file), 0o700);
      writeFileSync(`${file}.file`, "mine");
    },
  }))
    test(what, async () => {
      const directory = temporaryDirectory();
      const file = join(directory, "keys.db");
      prepare(file);
      const inFile = what.startsWith("in");
      const table = new Table(`sqlite://${inFile ? `${file}.file/keys.db` : file}`);
      const said = await refusal(table);
      expect(said).toContain(inFile ? `${file}.file` : file);
      if (what === "not a database") expect(readFileSync(file, "utf8")).toBe(content);
      if (inFile) expect(readFileSync(`${file}.file`, "utf8")).toBe("mine");
    });

  test("damaged", async () => {
    const table = await sqlite();
    await begin(table);
    await table.close();
    const bytes = readFileSync(table.file);
    writeFileSync(table.file, bytes.fill(255, 4_096));
    expect(await refusal(table)).toContain(table.file);
    expect(
      readFileSync(table.file)
        .subarray(4_096)
        .every((byte) => byte === 255),
    ).toBe(true);
  });
});
