/**
 * The quick part of trying to break the servers: input bent by a seed, odd bytes on the wire, many
 * at once. soak.ts goes on for longer. SEED=… sends other input.
 */

import { afterAll, describe, expect, test } from "bun:test";
import { Issuer } from "../support/jwt.ts";
import { api, idp, resource } from "../support/servers.ts";
import * as hostile from "./hostile.ts";
import { Connection, encode, once, repeat, tokenRequest } from "./hostile.ts";

const seed = Number(process.env["SEED"] ?? 20_250_601);
console.log(`SEED=${seed} makes the same hostile input again`);
const signer = hostile.signerNamed("signer");
const issuerWithKeys = () => Object.assign(new Issuer([]), { jwks: { keys: [signer.publicJwk] } });
const issuer = issuerWithKeys();
const tokens = await idp(hostile.hostileClients(resource));
const calls = await api(issuer.url);
const idpAt = { issuer: tokens.url, resource };
const apiAt = { issuer: issuer.url, resource: calls.url, signer };

afterAll(async () => {
  await Promise.all([tokens.stop(), calls.stop(), issuer.server.stop(true)]);
});

describe(`input bent by seed ${seed}`, () => {
  // What is refused has few different answers, so nothing of a request can be in them.
  const targets: [string, hostile.Target][] = [
    ["/connect/token", idpAt],
    ["/identity", apiAt],
  ];
  test.each(targets)("%s → 200 if all is well, else a constant refusal", async (_name, at) => {
    const tally = await hostile.attack(at, seed, 800);
    expect(tally.problems).toEqual([]);
    expect(tally.accepted).toBeGreaterThan(200);
    expect(tally.sent - tally.accepted).toBeGreaterThan(200);
    expect(tally.bends.size).toBeGreaterThan(12);
    expect(tally.refusals.size).toBeLessThanOrEqual(18);
  });
});

describe("bytes on the wire", () => {
  const get = (line: string) => `GET ${line}\r\nHost: x\r\n\r\n`;
  const health = get("/health HTTP/1.1");
  const head = tokenRequest().replace(/Content-Length: \d+\r\n([^]*)\r\n\r\n[^]*/, "$1\r\n");
  const inChunks = `${head}Transfer-Encoding: chunked\r\n\r\n`;
  const form = "grant_type=client_credentials";
  const chunk = `${form.length.toString(16)}\r\n${form}\r\n0\r\n\r\n`;

  const answered: [name: string, bytes: string, statuses: number[]][] = [
    ["a valid request", tokenRequest(), [200]],
    ["a form in chunks", inChunks + chunk, [200]],
    ["several requests", health + get("/x HTTP/1.1") + health, [200, 404, 200]],
  ];
  test.each(answered)("%s, whole and in pieces → answers", async (_, bytes, statuses) => {
    for (const pieces of [[bytes], bytes.match(/[^]{1,17}/g)!]) {
      const connection = new Connection(tokens.url);
      for (const piece of pieces) {
        connection.write(piece);
        await Bun.sleep(0);
      }
      for (const status of statuses) expect((await connection.next()).status).toBe(status);
      connection.close();
    }
  });

  const smuggled = `Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n${health}`;
  const refused: [name: string, bytes: string][] = [
    ["a length that is too short", `${head}Content-Length: 10\r\n\r\n${form}`],
    ["a length and chunks, RFC 9112 §6.1", head + smuggled],
    ["chunks without a length", `${inChunks}x\r\n${chunk}`],
    ["TLS on a port without", `\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03${"\x07".repeat(32)}`],
  ];
  test.each(refused)("%s → 4xx or 505, and nothing after it", async (_, bytes) => {
    for (const { url } of [tokens, calls]) {
      const connection = new Connection(url);
      connection.write(bytes);
      const { status } = await connection.next();
      expect(status === 505 || Math.floor(status / 100) === 4).toBe(true);
      for (const wait of [0.02, 0.02]) expect((await connection.next(wait)).status).not.toBe(200);
      connection.close();
    }
  });
});

// With the keys such a token is known to be bad, without them nothing is known of it.
test.each([401, 503])("/identity 200 unknown kids → %d after a single fetch", async (refusal) => {
  const own = issuerWithKeys();
  if (refusal === 503) own.answer = () => new Response("no", { status: 500 });
  const server = await api(own.url, { coolDownSeconds: 3_600 });
  const callWith = async (header: Record<string, unknown>) => {
    const jwt = hostile.tokenFor({ issuer: own.url, resource: server.url, signer }, "client");
    Object.assign(jwt.header, header);
    return (await once(server.url, hostile.callRequest(encode(jwt)))).status;
  };
  const statuses = await Promise.all(repeat(200, (index) => callWith({ kid: `no ${index}` })));
  expect(new Set(statuses)).toEqual(new Set([refusal]));
  expect(own.requests.length).toBe(refusal === 503 ? 1 : 2);
  expect(await callWith({})).toBe(refusal === 503 ? 503 : 200);
  await Promise.all([server.stop(), own.server.stop(true)]);
});

test("in all of this nothing failed, and the log has no secret, no key and no JWT", () => {
  const lines = [...tokens.lines, ...calls.lines];
  expect(lines.length).toBeGreaterThan(700);
  expect(lines.filter(({ event }) => event === "failure")).toEqual([]);
  expect(hostile.leaksIn(JSON.stringify(lines))).toEqual([]);
});
