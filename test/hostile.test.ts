/**
 * The quick part of trying to break the servers: input bent by a seed, raw bytes on the wire, more
 * callers than can be served, guesses, an issuer that misbehaves, a clock that steps. `bun run soak`
 * does the same for longer, and ends programs too.
 */

import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, setSystemTime, spyOn, test } from "bun:test";
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
  pair,
  proofFor,
  type Tally,
  tokenFor,
  tokenRequest,
} from "./hostile.ts";
import {
  captureLog,
  cleanUp,
  eventually,
  freeOrigin,
  launch,
  type Program,
  temporaryDirectory,
  withModule,
} from "./support.ts";

type Idp = typeof import("../idp.ts");
type Api = typeof import("../api.ts");

const seed = Number(process.env["SEED"] ?? 20_250_601);
const signer = pair("signer");
const fakeIssuer = new FakeIssuer(signer);
const resource = freeOrigin();
const issuer = freeOrigin();
const idpAt = { issuer, resource };
const apiAt = { issuer: fakeIssuer.origin, resource, signer };
const servers: { stop(hard?: boolean): Promise<void> }[] = [];

function startIdp(changes: Record<string, unknown> = {}): Promise<Idp> {
  const databaseUrl = `sqlite://${temporaryDirectory()}/keys.db`;
  const clients = hostileClients(resource);
  const authorizationServer = { issuer, databaseUrl, ...clients, ...changes };
  return withModule<Idp, Idp>("idp", { authorizationServer }, async (idp) => {
    servers.push(await idp.start());
    return idp;
  });
}

async function startApi(
  changes: Record<string, unknown> = {},
  origin = freeOrigin(),
): Promise<string> {
  const resourceServer = { issuer: fakeIssuer.origin, resource: origin, ...changes };
  await withModule<Api, void>("api", { resourceServer }, async (api) => {
    servers.push(await api.start());
  });
  return origin;
}

/** The lines of the servers in this process are not for the screen. */
let quiet: ReturnType<typeof captureLog>;

beforeAll(async () => {
  quiet = captureLog();
  await startIdp();
  await startApi({}, resource);
});

afterAll(async () => {
  await Promise.all(servers.map((server) => server.stop(true)));
  await fakeIssuer.stop();
  await cleanUp();
  quiet.stop();
});

// --- Requests ------------------------------------------------------------------------------------

const call = (origin: string, authorization: string) =>
  fetch(`${origin}/identity`, { headers: { authorization } });

const statuses = (answers: { status: number }[]) => [...new Set(answers.map((a) => a.status))];

// --- Input bent by a seed ------------------------------------------------------------------------

describe(`input bent by seed ${seed}`, () => {
  const count = 2_000;

  /** The refusals are few and constant, so that nothing of a request can be in them. */
  function expectUnbroken({ problems, refusals, sent, accepted, bends }: Tally, kinds: number) {
    expect(problems).toEqual([]);
    expect(sent).toBeGreaterThanOrEqual(count);
    expect(accepted).toBeGreaterThan(count / 10);
    expect(bends.size).toBeGreaterThan(60);
    expect(refusals.size).toBeLessThanOrEqual(kinds);
  }

  test(`POST /connect/token ${count} bent requests → a token where all is well, else a constant refusal`, async () => {
    const log = captureLog();
    const tally = await attack(idpAt, seed, count);
    await log.until(tally.accepted);
    log.stop();
    expectUnbroken(tally, 18);
    expectSilent(log.text());
  });

  test(`GET /identity ${count} bent calls → the claims where all is well, else a constant refusal`, async () => {
    const log = captureLog();
    const tally = await attack(apiAt, seed, count);
    await log.until(1);
    log.stop();
    expectUnbroken(tally, 26);
    expectSilent(log.text());
  });

  /**
   * Each line is one JSON object of ours; in none is a secret, a JWT or a private key. A server of
   * another test in this process may find its database back.
   */
  function expectSilent(text: string): void {
    for (const line of text.trimEnd().split("\n")) {
      expect(JSON.parse(line).event).toMatch(
        /^(token (issued|refused)|call refused|database back)$/,
      );
    }
    expect(text).not.toMatch(/eyJ[\w-]{8,}/);
    expect(confidential.filter((secret) => text.includes(secret))).toEqual([]);
  }
});

// --- Bytes on the wire ---------------------------------------------------------------------------

describe("bytes on the wire", () => {
  const health = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
  const elsewhere = health.replace("health", "elsewhere");
  const head = tokenRequest()
    .split("\r\n\r\n")[0]!
    .replace(/Content-Length: \d+/, "X: x");
  const form = "grant_type=client_credentials";
  const chunk = `${form.length.toString(16)}\r\n${form}\r\n0\r\n\r\n`;
  const rows: [name: string, statuses: number[], bytes: string][] = [
    ["a valid request", [200], tokenRequest()],
    ["in chunks", [200], `${head}\r\nTransfer-Encoding: chunked\r\n\r\n${chunk}`],
    ["pipelined", [200, 401, 404, 200], health + tokenRequest("wrong") + elsewhere + health],
    // Bun hangs up on a request that comes while the one before it is being answered.
    ["pipelined behind a token", [0, 0], tokenRequest() + tokenRequest()],
    [
      "Content-Length too short: the rest is no request",
      [400, 400, 0],
      `${head}\r\nContent-Length: 10\r\n\r\n${form}`,
    ],
    [
      "Content-Length and chunks: no request hidden in it is answered",
      [400, 0],
      `${head}\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n${health}`,
    ],
    ["two lengths", [400, 0], `${head}\r\nContent-Length: 29\r\nContent-Length: 30\r\n\r\n${form}`],
    ["a negative length", [400, 0], `${head}\r\nContent-Length: -1\r\n\r\n${form}`],
    ["a length of 2^64", [400, 0], `${head}\r\nContent-Length: ${2n ** 64n}\r\n\r\n${form}`],
    ["17 kB announced", [413, 0], `${head}\r\nContent-Length: 17000\r\n\r\n`],
    [
      "a chunk of no length",
      [400, 0],
      `${head}\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n${chunk}`,
    ],
    [
      "chunks that go on and on",
      [413, 0],
      `${head}\r\nTransfer-Encoding: chunked\r\n\r\n${`400\r\n${"a".repeat(1024)}\r\n`.repeat(40)}`,
    ],
    ["a head that goes on and on", [431, 0], `${head}\r\nX-Long: ${"a".repeat(40_000)}`],
    ["300 headers", [431, 0], `${head}\r\n${"X: y\r\n".repeat(300)}\r\n`],
    [
      "TLS on a port without",
      [400, 0],
      `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(32)}`,
    ],
    ["HTTP/2", [400, 0], "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ["line feeds alone", [505, 0], "GET /health HTTP/1.1\nHost: x\n\n"],
  ];

  test.each(rows)("%s → %p", async (_, wanted, bytes) => {
    for (const pieces of [[bytes], bytes.match(/[^]{1,997}/g)!]) {
      const connection = await Connection.open(issuer);
      const answers = Promise.all(wanted.map(() => connection.next()));
      for (const piece of pieces) connection.write(piece);
      expect((await answers).map(({ status }) => status)).toEqual(wanted);
      connection.close();
    }
  });

  test("byte by byte → 200", async () => {
    const connection = await Connection.open(issuer);
    const answer = connection.next();
    for (const byte of tokenRequest()) {
      connection.write(byte);
      await new Promise(setImmediate);
    }
    expect((await answer).status).toBe(200);
    connection.close();
  });

  const half = tokenRequest().slice(0, -5);
  const idle: [name: string, bytes: string][] = [
    ["say nothing", ""],
    ["stop within the head", half.slice(0, 40)],
    ["stop within the body", half],
  ];

  test.each(idle)("300 connections that %s, then hang up → others are served", async (_, bytes) => {
    const many = await Promise.all(Array.from({ length: 300 }, () => Connection.open(issuer)));
    for (const connection of many) connection.write(bytes);
    const other = await Connection.open(issuer);
    const log = captureLog();
    const answers: Answer[] = [];
    for (let i = 0; i < 20; i++) answers.push(await other.send(tokenRequest()));
    for (const connection of many) connection.close();
    answers.push(await other.send(tokenRequest()));
    await log.until(answers.length);
    log.stop();
    expect(statuses(answers)).toEqual([200]);
    // What was never sent in full is never a token.
    expect(log.requests.filter(({ event }) => event === "token issued").length).toBe(21);
    other.close();
  });

  test("200 TLS handshakes that stop half-way → others are served", async () => {
    const origin = freeOrigin().replace("http:", "https:");
    const cwd = temporaryDirectory();
    const idp = launch("idp", { cwd, env: { ISSUER: origin } });
    await idp.printed(/server/);
    const hello = `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(200)}`;
    const plain = origin.replace("https:", "http:");
    const many = await Promise.all(Array.from({ length: 200 }, () => Connection.open(plain)));
    for (const connection of many) connection.write(hello);
    const ca = await Bun.file(`${cwd}/keys/localhost.pem`).text();
    const other = await Connection.open(origin, ca);
    const answers = [];
    for (let i = 0; i < 10; i++) answers.push(await other.send(tokenRequest()));
    expect(statuses(answers)).toEqual([200]);
    for (const connection of many) connection.close();
    expect((await other.send(tokenRequest())).status).toBe(200);
    expect(idp.stderr.trim().split("\n").length).toBe(1);
    await idp.stop();
  });
});

// --- Load and guesses ----------------------------------------------------------------------------

describe("load", () => {
  test("320 callers at once → every token request and every call is answered with 200", async () => {
    const identity = callRequest(encode(tokenFor(apiAt, "client")));
    const caller = async (origin: string, request: string, times: number) => {
      const connection = await Connection.open(origin);
      const answers: Answer[] = [];
      for (let i = 0; i < times; i++) answers.push(await connection.send(request));
      connection.close();
      return answers;
    };
    const tokens = Array.from({ length: 160 }, () => caller(issuer, tokenRequest(), 6));
    const calls = Array.from({ length: 160 }, () => caller(resource, identity, 15));
    const answers = (await Promise.all([...tokens, ...calls])).flat();
    expect(answers.length).toBe(3_360);
    expect(statuses(answers)).toEqual([200]);
  });

  test("§2.3.1 3,000 guesses of a secret, pipelined → 401 each, and an honest client gets its tokens", async () => {
    const guess = async () => {
      const connection = await Connection.open(issuer);
      const answers = [];
      for (let round = 0; round < 15; round++) {
        const waiting = Array.from({ length: 50 }, () => connection.next());
        const guesses = Array.from({ length: 50 }, (_, i) => tokenRequest(`guess ${round} ${i}`));
        connection.write(guesses.join(""));
        answers.push(...(await Promise.all(waiting)));
      }
      connection.close();
      return answers;
    };
    const honest = async () => {
      const connection = await Connection.open(issuer);
      const answers = [];
      for (let i = 0; i < 20; i++) answers.push(await connection.send(tokenRequest()));
      connection.close();
      return answers;
    };
    const [answers, ...guesses] = await Promise.all([honest(), guess(), guess(), guess(), guess()]);
    expect(guesses.flat().length).toBe(3_000);
    expect(statuses(guesses.flat())).toEqual([401]);
    expect(statuses(answers)).toEqual([200]);
  });

  test("one proof sent ten times at once → a token for one of them", async () => {
    const proof = encode(proofFor("POST", `${issuer}/connect/token`));
    const request = tokenRequest("secret", `DPoP: ${proof}`);
    const send = async () => {
      const connection = await Connection.open(issuer);
      return await connection.send(request).finally(() => connection.close());
    };
    const answers = await Promise.all(Array.from({ length: 10 }, send));
    expect(answers.map(({ status }) => status).toSorted()).toEqual([200, ...Array(9).fill(400)]);
  });
});

// --- What a bad neighbour could do ---------------------------------------------------------------

describe("bounds", () => {
  const tokens = (at: typeof apiAt, count: number) =>
    Array.from({ length: count }, (_, i) => encode(tokenFor(at, `client ${i}`)));
  async function callEach(origin: string, accessTokens: string[]): Promise<number[]> {
    const connection = await Connection.open(origin);
    const answers = [];
    for (const token of accessTokens) {
      answers.push(await connection.send(callRequest(token)));
    }
    connection.close();
    return answers.map(({ status }) => status);
  }

  test("1,000 tokens of at most 4 kB are remembered, the oldest forgotten first", async () => {
    const origin = await startApi();
    const at = { ...apiAt, resource: origin };
    const verify = spyOn(crypto.subtle, "verify");
    const signaturesChecked = async (accessTokens: string[]) => {
      verify.mockClear();
      expect(new Set(await callEach(origin, accessTokens))).toEqual(new Set([200]));
      return verify.mock.calls.length;
    };
    const [first, second, ...others] = tokens(at, 1_001) as [string, string, ...string[]];
    const ofLength = (length: number) => {
      const claims = { ...tokenFor(at, "long").claims, padding: "" };
      const short = encode({ ...tokenFor(at, "long"), claims }).length;
      const padding = "x".repeat(Math.floor(((length - short) * 3) / 4));
      const long = encode({ ...tokenFor(at, "long"), claims: { ...claims, padding } });
      expect(Math.abs(long.length - length)).toBeLessThanOrEqual(2);
      return long;
    };
    try {
      await callEach(origin, tokens(at, 1)); // fetches the keys, and is not remembered
      expect(await signaturesChecked([first, second, ...others.slice(0, -1)])).toBe(1_000);
      expect(await signaturesChecked([first, second, first, others[500]!])).toBe(0);
      expect(await signaturesChecked([others.at(-1)!])).toBe(1);
      expect(await signaturesChecked([second])).toBe(0);
      expect(await signaturesChecked([first])).toBe(1);
      const [fits, tooLong] = [ofLength(4_086), ofLength(4_096)];
      expect(await signaturesChecked([fits, fits, fits])).toBe(1);
      expect(await signaturesChecked([tooLong, tooLong, tooLong])).toBe(3);
    } finally {
      verify.mockRestore();
    }
  });

  test("500 tokens with kids that nobody knows → 401, and the keys are fetched once per cool-down", async () => {
    const origin = await startApi({ coolDownSeconds: 3_600 });
    const at = { ...apiAt, resource: origin };
    const before = fakeIssuer.fetches;
    const unknown = Array.from({ length: 500 }, (_, i) => {
      const token = tokenFor(at, "client");
      return encode({ ...token, header: { ...token.header, kid: `unknown ${i}` } });
    });
    const answers = await Promise.all(
      [0, 1, 2, 3, 4].map((i) => callEach(origin, unknown.slice(i * 100, (i + 1) * 100))),
    );
    expect(new Set(answers.flat())).toEqual(new Set([401]));
    expect(fakeIssuer.fetches - before).toBe(2); // metadata and keys
    expect(await callEach(origin, tokens(at, 1))).toEqual([200]);
  });

  /** JSON nested as deep as 16 kB can be, in each JWT that a server reads. */
  const nested = "[".repeat(5_000) + "]".repeat(5_000);
  const deep = (claims: Record<string, unknown>) =>
    `${JSON.stringify(claims).slice(0, -1)},"deep":${nested}}`;

  test("a token with JSON nested 5,000 deep → an answer that is no 5xx", async () => {
    const token = tokenFor(apiAt, "client");
    const [status] = await callEach(resource, [
      encode({ ...token, claimsText: deep(token.claims) }),
    ]);
    expect([200, 401]).toContain(status!);
  });

  test("a proof with JSON nested 5,000 deep → an answer that is no 5xx", async () => {
    const proof = proofFor("POST", `${issuer}/connect/token`);
    const dpop = encode({ ...proof, claimsText: deep(proof.claims) });
    const connection = await Connection.open(issuer);
    const request = tokenRequest("secret", `DPoP: ${dpop}`);
    expect([200, 400]).toContain((await connection.send(request)).status);
    connection.close();
  });
});

// --- An issuer that misbehaves -------------------------------------------------------------------

describe("the issuer misbehaves while the API is called", () => {
  /** These take long, or much: `bun run soak` has them. */
  const slow = ["silence", "an endless body", "64 MiB, compressed", "JSON nested 500,000 deep"];
  const quick = (Object.keys(faults) as Fault[]).filter((fault) => !slow.includes(fault));
  const origin = freeOrigin();
  const issuerOfOne = new FakeIssuer(signer);
  const at = { issuer: issuerOfOne.origin, resource: origin, signer };
  let api: Program;

  beforeAll(async () => {
    const resourceServer = { refreshSeconds: 0.03, coolDownSeconds: 0.01 };
    const env = { ISSUER: issuerOfOne.origin, API_URL: origin };
    api = launch("api", { env, changes: { resourceServer } });
    await api.printed(/API/);
  });
  afterAll(async () => {
    await api.stop();
    await issuerOfOne.stop();
  });

  test.each([...quick, "down" as const])(
    "%s → a good token is answered with 200",
    async (fault) => {
      const good = `Bearer ${encode(tokenFor(at, "client"))}`;
      const stranger = tokenFor(at, "client");
      stranger.header["kid"] = "unknown";
      const unknown = `Bearer ${encode(stranger)}`;
      expect((await call(origin, good)).status).toBe(200);
      if (fault === "down") await issuerOfOne.stop();
      else issuerOfOne.fault = fault;
      const before = issuerOfOne.fetches;
      const answers: number[] = [];
      const others: number[] = [];
      for (let i = 0; i < 30; i++) {
        answers.push((await call(origin, good)).status);
        const fresh = `Bearer ${encode(tokenFor(at, `client ${i}`))}`;
        answers.push((await call(origin, fresh)).status);
        others.push((await call(origin, unknown)).status);
      }
      if (fault !== "down") {
        await eventually("keys fetched meanwhile", () => issuerOfOne.fetches > before);
      }
      expect(new Set(answers)).toEqual(new Set([200]));
      // Whether the token is good cannot be known while the keys cannot be fetched.
      expect(others.filter((status) => status !== 401 && status !== 503)).toEqual([]);
      issuerOfOne.fault = undefined;
      if (fault === "down") issuerOfOne.start();
      await eventually("401 again", async () => (await call(origin, unknown)).status === 401);
    },
  );

  // Bun.fetch unpacks far more than the bound before it hands out the first chunk.
  test("an answer that comes compressed is not unpacked → 503", async () => {
    const compressing = new FakeIssuer(signer);
    compressing.fault = "all is well, but compressed";
    const resource = await startApi({ issuer: compressing.origin });
    const token = tokenFor({ issuer: compressing.origin, resource, signer }, "client");
    const { status } = await call(resource, `Bearer ${encode(token)}`);
    await compressing.stop();
    expect(status).toBe(503);
  });
});

// --- Secrets that are sent in the wrong place ----------------------------------------------------

describe("a secret in the wrong place is refused and not in the log", () => {
  const secret = "a secret of the bound client";
  const encoded = secret.replaceAll(" ", "+");
  const grant = "grant_type=client_credentials";
  const rows: [name: string, authorization: string, body: string][] = [
    ["secret and client_id swapped, in Basic", `Basic ${btoa(`${encoded}:bound`)}`, grant],
    ["no colon in Basic", `Basic ${btoa(`bound${encoded}`)}`, grant],
    ["the secret alone, in Basic", `Basic ${btoa(encoded)}`, grant],
    ["as Bearer", `Bearer ${btoa(`bound:${encoded}`)}`, grant],
    ["swapped, in the form", "", `${grant}&client_id=${encoded}&client_secret=bound`],
    ["one parameter instead of two", "", `${grant}&client_id=bound:${encoded}`],
    ["as the scope", "", `${grant}&client_id=bound&client_secret=${encoded}&scope=${encoded}`],
    ["as the grant_type", "", `client_id=bound&client_secret=${encoded}&grant_type=${encoded}`],
    [
      "as an assertion",
      "",
      `${grant}&client_assertion_type=${encoded}&client_assertion=${encoded}`,
    ],
  ];

  test.each(rows)("%s", async (_, authorization, body) => {
    const log = captureLog();
    const answer = await fetch(`${issuer}/connect/token`, {
      method: "POST",
      headers: {
        "content-type": "application/x-www-form-urlencoded",
        ...(authorization && { authorization }),
      },
      body,
    });
    const text = await answer.text();
    await log.until(1);
    log.stop();
    expect([400, 401]).toContain(answer.status);
    expect([text, log.text()].filter((seen) => seen.includes(secret))).toEqual([]);
    expect([text, log.text()].filter((seen) => seen.includes(encoded))).toEqual([]);
  });
});

// --- A clock that steps --------------------------------------------------------------------------

describe("the clock steps back and forth by a minute", () => {
  const start = Math.floor(Date.now() / 1000);
  const at = (seconds: number) => void setSystemTime(new Date((start + seconds) * 1000));
  afterAll(() => void setSystemTime());

  test("a token is accepted until exp and the leeway, by whichever clock", async () => {
    const bearer = () => {
      const token = tokenFor(apiAt, "client");
      Object.assign(token.claims, { iat: start, nbf: start, exp: start + 60 });
      return `Bearer ${encode(token)}`;
    };
    const [known, offsets] = [bearer(), [0, 60, 0, 89, 91, 29, 120, 30, -30, -31, 0]];
    const refused: string[] = [];
    for (const offset of offsets) {
      at(offset);
      if ((await call(resource, known)).status !== 200) refused.push(`known at ${offset}`);
      if ((await call(resource, bearer())).status !== 200) refused.push(`new at ${offset}`);
    }
    const late = ["known at 91", "new at 91", "known at 120", "new at 120"];
    expect(refused).toEqual([...late, "new at -31"]); // one seen before is not early
  });

  test("a used jti stays used, and swept is nothing that is still good", async () => {
    const own = freeOrigin();
    const idp = await startIdp({ issuer: own });
    at(0);
    const dpop = encode(proofFor("POST", `${own}/connect/token`));
    const request = tokenRequest("secret", `DPoP: ${dpop}`);
    const connection = await Connection.open(own);
    expect((await connection.send(request)).status).toBe(200);
    for (const offset of [60, 0, -30, 60, 90, 60, 120, 60, 0]) {
      at(offset);
      await idp.refresh();
      const { status, body } = await connection.send(request);
      expect([offset, status, JSON.parse(body).error]).toEqual([offset, 400, "invalid_dpop_proof"]);
    }
    connection.close();
  });

  test("no key is lost or dated anew, and tokens are signed all the time", async () => {
    const own = freeOrigin();
    const file = `${temporaryDirectory()}/keys.db`;
    const { algorithms } = authorizationServer.signingKeys;
    const delays = { pollSeconds: 10, maxAgeSeconds: 1, refreshSeconds: 1, coolDownSeconds: 1 };
    const signingKeys = { algorithms, rotationSeconds: 100, retentionSeconds: 7_200, ...delays };
    at(0);
    const idp = await startIdp({ issuer: own, databaseUrl: `sqlite://${file}`, signingKeys });
    const database = new Database(file);
    const rows = () => database.query("SELECT * FROM signing_keys ORDER BY signs_from").all();
    const known = new Map<string, string>();
    for (const offset of [0, 60, 0, 95, 155, 95, 101, 41, 190, 250, 190, 210, 150]) {
      at(offset);
      await idp.refresh();
      const now = new Map(rows().map((row) => [(row as { kid: string }).kid, JSON.stringify(row)]));
      for (const [kid, row] of known) expect(now.get(kid)).toBe(row);
      for (const [kid, row] of now) known.set(kid, row);
      const connection = await Connection.open(own);
      expect((await connection.send(tokenRequest())).status).toBe(200);
      connection.close();
      const published = idp.publicKeys(start + offset).map(({ kid }) => `${kid}`);
      expect(published.toSorted()).toEqual([...now.keys()].toSorted());
    }
    expect(known.size).toBe(4);
    database.close();
  });
});
