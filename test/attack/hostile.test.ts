/**
 * The quick part of trying to break the servers: input bent by a seed, junk in each member of each
 * JWT, odd bytes on the wire, guesses, secrets in wrong places. soak.ts goes on for longer.
 */

import { afterAll, describe, expect, test } from "bun:test";
import { basic, post, send } from "../support/http.ts";
import { assertionType, Issuer } from "../support/jwt.ts";
import { api, idp, resource } from "../support/servers.ts";
import {
  assertionFor,
  attack,
  callRequest,
  Connection,
  encode,
  hostileClients,
  type Jwt,
  leaksIn,
  once,
  proofFor,
  provenCallRequest,
  provenTokenRequest,
  signerNamed,
  tokenFor,
  tokenRequest,
  wrongMembers,
} from "./hostile.ts";

const seed = Number(process.env["SEED"] ?? 20_250_601);
const signer = await signerNamed("signer");
const issuer = new Issuer([signer]);
const tokens = await idp(hostileClients(resource));
const calls = await api(issuer.url);
const idpAt = { issuer: tokens.url, resource };
const apiAt = { issuer: issuer.url, resource: calls.url, signer };
const bearer = () => encode(tokenFor(apiAt, "client"));
const bound = encode(tokenFor(apiAt, "client", true));

afterAll(async () => {
  await Promise.all([tokens.stop(), calls.stop(), issuer.server.stop(true)]);
});

const repeat = <Value>(count: number, make: (index: number) => Value) =>
  Array.from({ length: count }, (_, index) => make(index));

/** The statuses of requests that are sent together over one connection. */
async function statusesOf(url: string, requests: string[]): Promise<number[]> {
  const connection = await Connection.open(url);
  const answers = Promise.all(requests.map(() => connection.next()));
  connection.write(requests.join(""));
  return (await answers.finally(() => connection.close())).map(({ status }) => status);
}

describe(`input bent by seed ${seed}`, () => {
  const targets: [string, typeof apiAt | typeof idpAt][] = [
    ["POST /connect/token", idpAt],
    ["GET /identity", apiAt],
  ];

  // What is refused has few different answers, so nothing of a request can be in them.
  test.each(targets)("%s → 200 where all is well, else a constant refusal", async (_name, at) => {
    const count = 600;
    const tally = await attack(at, seed, count);
    expect(tally.problems).toEqual([]);
    expect(tally.sent).toBeGreaterThanOrEqual(count);
    expect(tally.accepted).toBeGreaterThan(count / 10);
    expect(tally.bends.size).toBeGreaterThan(20);
    expect(tally.refusals.size).toBeLessThanOrEqual(20);
  });

  const tokenStatus = async (parameters: Record<string, string>, headers = {}) => {
    const body = { grant_type: "client_credentials", ...parameters };
    return (await post(tokens.tokenEndpoint, body, headers)).status;
  };
  const callStatus = async (headers: Record<string, string>) =>
    (await send(`${calls.url}/identity`, { headers })).status;
  const authorization = basic("client", "secret");
  const kinds: [string, number[], Jwt, (jwt: string) => Promise<number>][] = [
    [
      "POST /connect/token, RFC 7523 §3 an assertion",
      [401],
      assertionFor(tokens.url),
      (jwt) => tokenStatus({ client_assertion_type: assertionType, client_assertion: jwt }),
    ],
    [
      "POST /connect/token, RFC 9449 §4.3 a proof",
      [400],
      proofFor("POST", tokens.tokenEndpoint),
      (dpop) => tokenStatus({}, { authorization, dpop }),
    ],
    [
      "GET /identity, RFC 9449 §4.3 a proof",
      [401],
      proofFor("GET", `${calls.url}/identity`, bound),
      (dpop) => callStatus({ authorization: `DPoP ${bound}`, dpop }),
    ],
    [
      "GET /identity, RFC 9068 §4 an access token",
      [401, 403],
      tokenFor(apiAt, "client"),
      (jwt) => callStatus({ authorization: `Bearer ${jwt}` }),
    ],
  ];

  test.each(kinds)("%s with junk in any member → %p", async (_name, refusals, jwt, sendIt) => {
    const wrong = wrongMembers(jwt);
    const statuses = await Promise.all(wrong.map((one) => sendIt(encode(one))));
    const undue = wrong.filter((_one, index) => !refusals.includes(statuses[index]!));
    expect(undue.map(({ header, claims }) => ({ header, claims }))).toEqual([]);
    expect(wrong.length).toBeGreaterThan(80);
    expect(await sendIt(encode(jwt))).toBe(200);
  });
});

describe("bytes on the wire", () => {
  const get = (line: string, host = "x") => `GET ${line}\r\nHost: ${host}\r\n\r\n`;
  const health = get("/health HTTP/1.1");
  const head = tokenRequest().replace(/Content-Length: \d+\r\n[^]*/, "");
  const inChunks = `${head}Content-Type: application/x-www-form-urlencoded\r\nTransfer-Encoding: chunked`;
  const form = "grant_type=client_credentials&client_id=client&client_secret=secret";
  const chunk = `${form.length.toString(16)}\r\n${form}\r\n0\r\n\r\n`;

  const answered: [name: string, statuses: number[], bytes: string][] = [
    ["a valid request", [200], tokenRequest()],
    ["a form in chunks", [200], `${inChunks}\r\n\r\n${chunk}`],
    ["an absolute target", [200], get("http://evil.example/health HTTP/1.1")],
    ["HTTP/1.0 without a Host", [200], "GET /health HTTP/1.0\r\n\r\n"],
    ["another Host", [200], get("/health HTTP/1.1", "evil.example:1")],
    ["CONNECT", [404], "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"],
    ["a target of two slashes", [404], get("//health HTTP/1.1")],
    ["a target that is no URL", [404], get("//[ HTTP/1.1")],
    [
      "several requests",
      [200, 401, 404, 200],
      health + tokenRequest("no") + get("/x HTTP/1.1") + health,
    ],
  ];

  test.each(answered)("%s → %p", async (_name, statuses, bytes) => {
    for (const pieces of [[bytes], bytes.match(/[^]{1,17}/g)!]) {
      const connection = await Connection.open(tokens.url);
      const answers = Promise.all(statuses.map(() => connection.next()));
      for (const piece of pieces) {
        connection.write(piece);
        await Bun.sleep(0);
      }
      expect((await answers).map(({ status }) => status)).toEqual(statuses);
      connection.close();
    }
  });

  const refused: [name: string, bytes: string][] = [
    ["a Host that is no host", get("/health HTTP/1.1", "[")],
    ["a length that is too short", `${head}Content-Length: 10\r\n\r\n${form}`],
    [
      "a length and chunks",
      `${head}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n${health}`,
    ],
    ["two lengths", `${head}Content-Length: 29\r\nContent-Length: 30\r\n\r\n${form}`],
    ["a negative length", `${head}Content-Length: -1\r\n\r\n${form}`],
    ["a length of 2^64", `${head}Content-Length: ${2n ** 64n}\r\n\r\n${form}`],
    ["17 kB announced", `${head}Content-Length: 17000\r\n\r\n`],
    ["a chunk without a length", `${inChunks}\r\n\r\nx\r\n${chunk}`],
    [
      "chunks that go on and on",
      `${inChunks}\r\n\r\n${`400\r\n${"a".repeat(1024)}\r\n`.repeat(40)}`,
    ],
    ["a field that goes on and on", `${head}X-Long: ${"a".repeat(40_000)}`],
    ["300 fields", `${head}${"X: y\r\n".repeat(300)}\r\n`],
    ["a target of 40 kB", get(`/${"a".repeat(40_000)} HTTP/1.1`)],
    ["TLS on a port without", `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(32)}`],
    ["HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ["line feeds alone", "GET /health HTTP/1.1\nHost: x\n\n"],
  ];

  test.each(refused)(
    "%s → an answer of 400 to 499 or 505, and nothing after it",
    async (_name, bytes) => {
      for (const { url } of [tokens, calls]) {
        const connection = await Connection.open(url);
        const answers = [connection.next(), connection.next(0.02), connection.next(0.02)];
        connection.write(bytes);
        const [first, ...others] = (await Promise.all(answers)).map(({ status }) => status);
        expect(first === 505 || (first! >= 400 && first! < 500)).toBe(true);
        expect(others.filter((status) => status >= 200 && status < 300)).toEqual([]);
        connection.close();
      }
    },
  );

  const half = tokenRequest().slice(0, -5);
  test.each(["", half.slice(0, 40), half])(
    "100 connections stop after %j → others are served",
    async (bytes) => {
      const idle = await Promise.all(repeat(100, () => Connection.open(tokens.url)));
      for (const connection of idle) connection.write(bytes);
      const issued = () => tokens.lines.filter(({ event }) => event === "token issued").length;
      const before = issued();
      expect((await once(tokens.url, tokenRequest())).status).toBe(200);
      for (const connection of idle) connection.close();
      expect((await once(tokens.url, tokenRequest())).status).toBe(200);
      expect(issued() - before).toBe(2);
    },
  );
});

describe("many at once", () => {
  test("POST /connect/token, RFC 6749 §2.3.1 1,000 wrong guesses → 401, and who is right is served", async () => {
    const guesses = repeat(4, (i) => repeat(250, (j) => tokenRequest(`guess ${i} ${j}`)));
    const honest = repeat(5, async () => (await once(tokens.url, tokenRequest())).status);
    const refused = await Promise.all(guesses.map((some) => statusesOf(tokens.url, some)));
    expect(new Set(refused.flat())).toEqual(new Set([401]));
    expect(await Promise.all(honest)).toEqual([200, 200, 200, 200, 200]);
  });

  const proven: [string, string, string][] = [
    ["POST /connect/token", tokens.url, provenTokenRequest(tokens.url)],
    ["GET /identity", calls.url, provenCallRequest(calls.url, bound)],
  ];
  test.each(proven)(
    "%s, RFC 9449 §11.1 one proof ten times → one 200",
    async (_name, url, request) => {
      const answers = await Promise.all(repeat(10, () => once(url, request)));
      expect(answers.filter(({ status }) => status === 200).length).toBe(1);
      expect(answers.filter(({ status }) => status === 400 || status === 401).length).toBe(9);
    },
  );

  // A good token is answered with 200 once the keys were fetched, and 503 while they cannot be.
  test.each([401, 503])(
    "GET /identity 200 unknown kids → %d, and one fetch in a cool-down",
    async (refusal) => {
      const own = new Issuer([signer]);
      if (refusal === 503) own.answer = () => new Response("no", { status: 500 });
      const server = await api(own.url, { coolDownSeconds: 3_600 });
      const at = { issuer: own.url, resource: server.url, signer };
      const unknown = repeat(200, (index) => {
        const jwt = tokenFor(at, "client");
        return callRequest(encode({ ...jwt, header: { ...jwt.header, kid: `unknown ${index}` } }));
      });
      const parts = [unknown.slice(0, 100), unknown.slice(100)];
      const statuses = await Promise.all(parts.map((part) => statusesOf(server.url, part)));
      expect(new Set(statuses.flat())).toEqual(new Set([refusal]));
      expect(own.requests.length).toBe(refusal === 503 ? 1 : 2);
      const good = await once(server.url, callRequest(encode(tokenFor(at, "client"))));
      expect(good.status).toBe(refusal === 503 ? 503 : 200);
      await Promise.all([server.stop(), own.server.stop(true)]);
    },
  );
});

describe("secrets and tokens", () => {
  const secret = "a+secret+of+the+bound+client";
  const misplaced: [name: string, authorization: string, body: string][] = [
    ["id and secret swapped in Basic", `Basic ${btoa(`${secret}:bound`)}`, ""],
    ["no colon in Basic", `Basic ${btoa(`bound${secret}`)}`, ""],
    ["the secret alone in Basic", `Basic ${btoa(secret)}`, ""],
    ["as Bearer", `Bearer ${btoa(`bound:${secret}`)}`, ""],
    ["swapped in the form", "", `client_id=${secret}&client_secret=bound`],
    ["one parameter instead of two", "", `client_id=bound:${secret}`],
    ["as the scope", "", `client_id=bound&client_secret=${secret}&scope=${secret}`],
    ["as the resource", "", `client_id=bound&client_secret=${secret}&resource=${secret}`],
    ["as an assertion", "", `client_assertion_type=${secret}&client_assertion=${secret}`],
  ];

  test.each(misplaced)(
    "POST /connect/token a secret in the wrong place, %s → refused",
    async (_name, authorization, body) => {
      const headers = authorization ? { authorization } : {};
      const form = `grant_type=client_credentials&${body}`;
      const { status, text } = await post(tokens.tokenEndpoint, form, headers);
      expect([400, 401]).toContain(status);
      expect(text).not.toMatch(/secret.of.the/);
    },
  );

  test("in all of this nothing failed, and the log has no secret, no key and no JWT", async () => {
    await once(calls.url, callRequest(bearer()));
    const lines = [...tokens.lines, ...calls.lines];
    expect(lines.length).toBeGreaterThan(1_000);
    expect(lines.filter(({ event }) => event === "failure")).toEqual([]);
    expect(leaksIn(JSON.stringify(lines))).toEqual([]);
    expect(JSON.stringify(lines)).not.toMatch(/secret\+of\+the/);
  });
});
