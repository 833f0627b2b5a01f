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
  repeat,
  signerNamed,
  type Target,
  tokenFor,
  tokenRequest,
  wrongMembers,
} from "./hostile.ts";

const seed = Number(process.env["SEED"] ?? 20_250_601);
const signer = await signerNamed("signer");
const issuer = new Issuer([signer]);
const tokens = await idp(hostileClients(resource));
const calls = await api(issuer.url);
const idpAt: Target = { issuer: tokens.url, resource };
const apiAt: Target = { issuer: issuer.url, resource: calls.url, signer };
const bound = encode(tokenFor(apiAt, "client", true));

afterAll(async () => {
  await Promise.all([tokens.stop(), calls.stop(), issuer.server.stop(true)]);
});

describe(`input bent by seed ${seed}`, () => {
  // What is refused has few different answers, so nothing of a request can be in them.
  const targets: [string, Target][] = Object.entries({
    "/connect/token": idpAt,
    "/identity": apiAt,
  });
  test.each(targets)("%s → 200 if all is well, else a constant refusal", async (_name, at) => {
    const count = 600;
    const tally = await attack(at, seed, count);
    expect(tally.problems).toEqual([]);
    expect(tally.sent).toBeGreaterThanOrEqual(count);
    expect(tally.accepted).toBeGreaterThan(count / 10);
    expect(tally.bends.size).toBeGreaterThan(15);
    expect(tally.refusals.size).toBeLessThanOrEqual(18);
  });

  const tokenStatus = async (parameters: Record<string, string>, headers = {}) => {
    const form = { grant_type: "client_credentials", ...parameters };
    return (await post(tokens.tokenEndpoint, form, headers)).status;
  };
  const callStatus = async (headers: Record<string, string>) =>
    (await send(`${calls.url}/identity`, { headers })).status;
  /** What each answers, where the JWT stands, and one that is good. */
  const kinds: Record<string, [number[], Jwt, (jwt: string) => Promise<number>]> = {
    "/connect/token, RFC 7523 §3 an assertion": [
      [401],
      assertionFor(tokens.url),
      (jwt) => tokenStatus({ client_assertion_type: assertionType, client_assertion: jwt }),
    ],
    "/connect/token, RFC 9449 §4.3 a proof": [
      [400],
      proofFor("POST", tokens.tokenEndpoint),
      (dpop) => tokenStatus({}, { authorization: basic("client", "secret"), dpop }),
    ],
    "/identity, RFC 9449 §4.3 a proof": [
      [401],
      proofFor("GET", `${calls.url}/identity`, bound),
      (dpop) => callStatus({ authorization: `DPoP ${bound}`, dpop }),
    ],
    "/identity, RFC 9068 §4 an access token": [
      [401, 403],
      tokenFor(apiAt, "client"),
      (jwt) => callStatus({ authorization: `Bearer ${jwt}` }),
    ],
  };
  test.each(Object.keys(kinds))("%s with junk in any member is refused", async (kind) => {
    const [refusals, jwt, statusOf] = kinds[kind]!;
    const undue: unknown[] = [];
    for (const wrong of wrongMembers(jwt)) {
      const status = await statusOf(encode(wrong));
      if (!refusals.includes(status)) undue.push([status, wrong.header, wrong.claims]);
    }
    expect(undue).toEqual([]);
    expect(await statusOf(encode(jwt))).toBe(200);
  });
});

describe("bytes on the wire", () => {
  const get = (line: string, host = "x") => `GET ${line}\r\nHost: ${host}\r\n\r\n`;
  const health = get("/health HTTP/1.1");
  const head = tokenRequest().replace(/Content-Length: \d+\r\n([^]*)\r\n\r\n[^]*/, "$1\r\n");
  const inChunks = `${head}Transfer-Encoding: chunked\r\n\r\n`;
  const form = "grant_type=client_credentials";
  const chunk = `${form.length.toString(16)}\r\n${form}\r\n0\r\n\r\n`;

  const answered: Record<string, [number[], string]> = {
    "a valid request": [[200], tokenRequest()],
    "a form in chunks": [[200], inChunks + chunk],
    "an absolute target": [[200], get("http://evil.example/health HTTP/1.1")],
    "HTTP/1.0 without a Host": [[200], "GET /health HTTP/1.0\r\n\r\n"],
    "another Host": [[200], get("/health HTTP/1.1", "evil.example:1")],
    CONNECT: [[404], "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"],
    "a target with two slashes": [[404], get("//health HTTP/1.1")],
    "a target that is no URL": [[404], get("//[ HTTP/1.1")],
    "several requests": [[200, 404, 200], health + get("/x HTTP/1.1") + health],
  };
  test.each(Object.keys(answered))("%s, whole and in pieces → an answer", async (name) => {
    const [statuses, bytes] = answered[name]!;
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

  const refused: Record<string, string> = {
    "a Host that is no host": get("/health HTTP/1.1", "["),
    "a length that is too short": `${head}Content-Length: 10\r\n\r\n${form}`,
    "a length and chunks": `${head}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n${health}`,
    "two lengths": `${head}Content-Length: 29\r\nContent-Length: 30\r\n\r\n${form}`,
    "a negative length": `${head}Content-Length: -1\r\n\r\n${form}`,
    "a length of 2^64": `${head}Content-Length: ${2n ** 64n}\r\n\r\n${form}`,
    "chunks without a length": `${inChunks}x\r\n${chunk}`,
    "a field that goes on and on": `${head}X-Long: ${"a".repeat(40_000)}`,
    "300 fields": `${head}${"X: y\r\n".repeat(300)}\r\n`,
    "a target of 40 kB": get(`/${"a".repeat(40_000)} HTTP/1.1`),
    "TLS on a port without": `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(32)}`,
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "line feeds alone": "GET /health HTTP/1.1\nHost: x\n\n",
  };
  test.each(Object.keys(refused))("%s → 4xx or 505, and nothing after it", async (name) => {
    for (const { url } of [tokens, calls]) {
      const connection = await Connection.open(url);
      const answers = [connection.next(), connection.next(0.02), connection.next(0.02)];
      connection.write(refused[name]!);
      const [first = 0, ...others] = (await Promise.all(answers)).map(({ status }) => status);
      expect(first === 505 || Math.floor(first / 100) === 4).toBe(true);
      expect(others.filter((status) => status >= 200 && status < 300)).toEqual([]);
      connection.close();
    }
  });

  test("300 connections that stop somewhere in a request keep nobody out", async () => {
    const idle = await Promise.all(repeat(300, () => Connection.open(tokens.url)));
    const half = tokenRequest().slice(0, -5);
    for (const [index, connection] of idle.entries())
      connection.write(half.slice(0, (index * half.length) / 300));
    const issued = () => tokens.lines.filter(({ event }) => event === "token issued").length;
    const before = issued();
    expect((await once(tokens.url, tokenRequest())).status).toBe(200);
    for (const connection of idle) connection.close();
    expect((await once(tokens.url, tokenRequest())).status).toBe(200);
    expect(issued() - before).toBe(2);
  });
});

// With the keys such a token is known to be bad, without them nothing is known of it.
test.each([401, 503])("/identity 200 unknown kids → %d after a single fetch", async (refusal) => {
  const own = new Issuer([signer]);
  if (refusal === 503) own.answer = () => new Response("no", { status: 500 });
  const server = await api(own.url, { coolDownSeconds: 3_600 });
  const callWith = async (header: Record<string, unknown>) => {
    const jwt = tokenFor({ issuer: own.url, resource: server.url, signer }, "client");
    Object.assign(jwt.header, header);
    return (await once(server.url, callRequest(encode(jwt)))).status;
  };
  const statuses = await Promise.all(repeat(200, (index) => callWith({ kid: `no ${index}` })));
  expect(new Set(statuses)).toEqual(new Set([refusal]));
  expect(own.requests.length).toBe(refusal === 503 ? 1 : 2);
  expect(await callWith({})).toBe(refusal === 503 ? 503 : 200);
  await Promise.all([server.stop(), own.server.stop(true)]);
});

describe("a secret in the wrong place is refused, and not repeated", () => {
  const secret = "a+secret+of+the+bound+client";
  const client = `client_id=bound&client_secret=${secret}`;
  const misplaced: Record<string, [authorization: string, body: string]> = {
    "id and secret swapped in Basic": [`Basic ${btoa(`${secret}:bound`)}`, ""],
    "no colon in Basic": [`Basic ${btoa(`bound${secret}`)}`, ""],
    "as Bearer": [`Bearer ${btoa(`bound:${secret}`)}`, ""],
    "id and secret swapped in the form": ["", `client_id=${secret}&client_secret=bound`],
    "both in client_id": ["", `client_id=bound:${secret}`],
    "as the scope": ["", `${client}&scope=${secret}`],
    "as the resource": ["", `${client}&resource=${secret}`],
    "as an assertion": ["", `client_assertion_type=${secret}&client_assertion=${secret}`],
  };
  test.each(Object.keys(misplaced))("%s", async (name) => {
    const [authorization, body] = misplaced[name]!;
    const headers = authorization ? { authorization } : {};
    const form = `grant_type=client_credentials&${body}`;
    const { status, text } = await post(tokens.tokenEndpoint, form, headers);
    expect([400, 401]).toContain(status);
    expect(text).not.toMatch(/secret.of.the/);
  });

  test("in all of this nothing failed, and the log has no secret, no key and no JWT", () => {
    const lines = [...tokens.lines, ...calls.lines];
    expect(lines.length).toBeGreaterThan(700);
    expect(lines.filter(({ event }) => event === "failure")).toEqual([]);
    expect(leaksIn(JSON.stringify(lines))).toEqual([]);
    expect(JSON.stringify(lines)).not.toMatch(/secret\+of\+the/);
  });
});
