/**
 * DPoP (RFC 9449) at both servers: a proof binds a token to a key at the token endpoint, and shows
 * with every call that the caller has that key. Each row is one deviation from a valid proof.
 */

import { beforeAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import { basic, challenges, post, send } from "../support/http.ts";
import { accessToken, Issuer, key, type Key, proof } from "../support/jwt.ts";
import { api, idp } from "../support/servers.ts";

const holder = await key("ES256");
const other = await key("ES256");
const rsa = await key("PS256");
const signer = await key("ES256");
const issuer = new Issuer([signer]);
const jkt = await jose.calculateJwkThumbprint(holder.publicJwk);
let now = Date.now();
const seconds = () => Math.floor(now / 1000);

const registration = {
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 600,
  client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }],
};
const clients = [
  { ...registration, client_id: "client" },
  { ...registration, client_id: "bound", dpop_bound_access_tokens: true },
];
let tokens: Awaited<ReturnType<typeof idp>>;
let calls: Awaited<ReturnType<typeof api>>;
let token: string;

beforeAll(async () => {
  tokens = await idp({ clients, clock: () => now });
  calls = await api(issuer.url, { clock: () => now });
  token = await tokenOf("client");
});

/** A bound access token of a client. */
const tokenOf = async (client_id: string, changes = {}) =>
  await accessToken(signer, issuer.url, calls.url, { client_id, cnf: { jkt }, ...changes });

/** Requests a token with a proof, or without one. */
async function request(dpop?: string, client_id = "client") {
  const headers = { authorization: basic(client_id, "secret"), ...(dpop && { dpop }) };
  return await post(tokens.tokenEndpoint, { grant_type: "client_credentials" }, headers);
}

/** Calls the API with a token and a proof. */
async function call(dpop?: string, access_token = token, scheme = "DPoP", path = "/identity") {
  const headers = { authorization: `${scheme} ${access_token}`, ...(dpop && { dpop }) };
  return await send(calls.url + path, { headers });
}

interface Row {
  name: string;
  ok?: boolean;
  claims?: () => Record<string, unknown>;
  header?: Record<string, unknown>;
  signer?: Key;
}

const { d } = holder.privateJwk;
const { kid: _kid, alg: _alg, ...publicJwk } = holder.publicJwk;
const { kid: _k, alg: _a, ...rsaJwk } = rsa.publicJwk;

/** What holds at both servers. */
const rows: Row[] = [
  { name: "RFC 9449 §4.3 a valid proof", ok: true },
  { name: "RFC 9449 §4.3 (3) no htm", claims: () => ({ htm: undefined }) },
  { name: "RFC 9449 §4.3 (3) no htu", claims: () => ({ htu: undefined }) },
  { name: "RFC 9449 §4.3 (3) no iat", claims: () => ({ iat: undefined }) },
  { name: "RFC 9449 §4.3 (3) iat as text", claims: () => ({ iat: String(seconds()) }) },
  { name: "RFC 9449 §4.3 (3) no jti", claims: () => ({ jti: undefined }) },
  { name: "RFC 9449 §4.3 (3) an empty jti", claims: () => ({ jti: "" }) },
  { name: "RFC 9449 §4.3 (3) a number as jti", claims: () => ({ jti: 7 }) },
  { name: "RFC 9449 §4.3 (4) no typ", header: { typ: undefined } },
  { name: "RFC 9449 §4.3 (4) typ JWT", header: { typ: "JWT" } },
  { name: "RFC 9449 §4.3 (4) typ at+jwt", header: { typ: "at+jwt" } },
  { name: "RFC 9449 §4.3 (6) signed by another key", signer: other, header: { jwk: publicJwk } },
  { name: "RFC 9449 §4.3 (6) no jwk", header: { jwk: undefined } },
  { name: "RFC 9449 §4.3 (7) a private key", header: { jwk: { ...publicJwk, d } } },
  { name: "RFC 9449 §4.3 (8) another method", claims: () => ({ htm: "PUT" }) },
  { name: "RFC 9449 §4.3 (8) the method in small letters", claims: () => ({ htm: "post" }) },
  { name: "RFC 9449 §4.3 (8) an object as htm", claims: () => ({ htm: { toString: 1 } }) },
  { name: "RFC 9449 §4.3 (9) an object as htu", claims: () => ({ htu: { toString: 1 } }) },
  { name: "RFC 9449 §4.3 (9) another host", claims: () => ({ htu: "https://a.example/identity" }) },
  { name: "RFC 9449 §4.3 (9) no URL", claims: () => ({ htu: "identity" }) },
  { name: "RFC 9449 §4.3 (11) iat 90 s ago", ok: true, claims: () => ({ iat: seconds() - 90 }) },
  { name: "RFC 9449 §4.3 (11) iat 91 s ago", claims: () => ({ iat: seconds() - 91 }) },
  { name: "RFC 9449 §4.3 (11) iat in 30 s", ok: true, claims: () => ({ iat: seconds() + 30 }) },
  { name: "RFC 9449 §4.3 (11) iat in 31 s", claims: () => ({ iat: seconds() + 31 }) },
  { name: "RFC 9449 §4.2 exp, not reached", ok: true, claims: () => ({ exp: seconds() + 9 }) },
  { name: "RFC 9449 §4.2 exp, long ago", claims: () => ({ exp: seconds() - 31 }) },
  { name: "RFC 7515 §4.1.11 crit", header: { crit: ["b64"], b64: true } },
  { name: "RFC 9449 §4.2 further claims", ok: true, claims: () => ({ nonce: "x", more: [1] }) },
];

/** Members of a private or symmetric key, beside a public one: some pass jose. */
const secretMembers = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];
for (const member of secretMembers.slice(1))
  rows.push({
    name: `RFC 9449 §4.3 (7) ${member} beside a public RSA key`,
    signer: rsa,
    header: { jwk: { ...rsaJwk, [member]: member === "oth" ? [] : "AQAB" } },
  });

const proofOf = async (row: Row, htm: string, htu: string, access_token?: string) => {
  const claims = { iat: seconds(), ...row.claims?.() };
  return await proof(row.signer ?? holder, htm, htu, access_token, claims, row.header);
};

describe("POST /connect/token", () => {
  for (const row of rows)
    test(`${row.name} → ${row.ok ? "200, token_type DPoP" : "400 invalid_dpop_proof"}`, async () => {
      const answer = await request(await proofOf(row, "POST", tokens.tokenEndpoint));
      if (!row.ok) {
        expect([answer.status, answer.json.error]).toEqual([400, "invalid_dpop_proof"]);
        expect(tokens.lines.at(-1)).toMatchObject({ client_id: "client" });
        return expect(tokens.lines.at(-1)!["reason"]).toMatch(/^[A-Z].{10,}\.$/);
      }
      expect([answer.status, answer.json.token_type]).toEqual([200, "DPoP"]);
      expect(jose.decodeJwt(answer.json.access_token)["cnf"]).toEqual({ jkt });
    });

  const urls: [name: string, change: (url: string) => string, status: number][] = [
    ["a query and a fragment", (url) => `${url}?a=b#c`, 200],
    ["the scheme and host in capitals", (url) => url.replace("http", "HTTP"), 200],
    ["dots in the path", (url) => url.replace("/token", "/x/../token"), 200],
    ["a slash at the end", (url) => `${url}/`, 400],
    ["the path in capitals", (url) => url.replace("token", "TOKEN"), 400],
    ["another port", (url) => url.replace(/:\d+/, ":1"), 400],
    ["https", (url) => url.replace("http", "https"), 400],
  ];
  for (const [name, change, status] of urls)
    test(`RFC 9449 §4.3 (9) htu with ${name} → ${status}`, async () => {
      const dpop = await proofOf({ name }, "POST", change(tokens.tokenEndpoint));
      expect((await request(dpop)).status).toBe(status);
    });

  test("RFC 9449 §4.3 (1) two proofs, junk, an empty one → 400", async () => {
    const [one, two] = [await proofOf(rows[0]!, "POST", tokens.tokenEndpoint), "x"];
    for (const dpop of [`${one}, ${one}`, two, "a.b.c"])
      expect((await request(dpop)).json.error).toBe("invalid_dpop_proof");
  });

  test("RFC 9449 §11.1 a proof twice, ten times at once → one token", async () => {
    const dpop = await proofOf(rows[0]!, "POST", tokens.tokenEndpoint);
    const all = await Promise.all(Array.from({ length: 10 }, async () => await request(dpop)));
    expect(all.filter(({ status }) => status === 200).length).toBe(1);
    expect((await request(dpop)).json.error).toBe("invalid_dpop_proof");
  });

  test("RFC 9449 §11.1 one jti under two keys → two tokens", async () => {
    const row = { ...rows[0]!, claims: () => ({ jti: "same" }) };
    const dpop = await proofOf(row, "POST", tokens.tokenEndpoint);
    const dpopOfOther = await proofOf({ ...row, signer: other }, "POST", tokens.tokenEndpoint);
    expect([(await request(dpop)).status, (await request(dpopOfOther)).status]).toEqual([200, 200]);
  });

  test("RFC 9449 §5.2 a client registered for bound tokens gets no other", async () => {
    const without = await request(undefined, "bound");
    expect([without.status, without.json.error]).toEqual([400, "invalid_dpop_proof"]);
    const dpop = await proofOf(rows[0]!, "POST", tokens.tokenEndpoint);
    expect((await request(dpop, "bound")).json.token_type).toBe("DPoP");
    expect((await request()).json.token_type).toBe("Bearer");
  });
});

describe("GET /identity", () => {
  for (const row of rows)
    test(`${row.name} → ${row.ok ? 200 : "401 invalid_dpop_proof"}`, async () => {
      const answer = await call(await proofOf(row, "GET", `${calls.url}/identity`, token));
      if (row.ok) return expect(answer.status).toBe(200);
      expect(answer.status).toBe(401);
      const { dpop, bearer } = challenges(answer);
      expect(dpop!["error"]).toBe("invalid_dpop_proof");
      expect(dpop!["algs"]!.split(" ")).toContain("ES256");
      expect(bearer!["error"]).toBeUndefined();
      expect(calls.lines.at(-1)!["reason"]).toMatch(/^[A-Z].{10,}\.$/);
      expect(JSON.stringify(calls.lines.at(-1))).not.toContain(token);
    });

  const url = () => `${calls.url}/identity`;
  const expectRefusal = async (answer: Awaited<ReturnType<typeof call>>, error: string) =>
    expect([answer.status, challenges(answer)["dpop"]!["error"]]).toEqual([401, error]);

  test("RFC 9449 §4.3 (9) the query does not count, the path does", async () => {
    const dpop = await proofOf(rows[0]!, "GET", url(), token);
    expect((await call(dpop, token, "DPoP", "/identity?a=b")).status).toBe(200);
    const elsewhere = await proofOf(rows[0]!, "GET", `${calls.url}/health`, token);
    await expectRefusal(await call(elsewhere), "invalid_dpop_proof");
  });

  test("RFC 9449 §4.3 (12) no ath, the ath of another token, another key → 401", async () => {
    const second = await tokenOf("client");
    for (const dpop of [
      await proofOf(rows[0]!, "GET", url()),
      await proofOf(rows[0]!, "GET", url(), second),
      await proofOf({ ...rows[0]!, signer: other }, "GET", url(), token),
    ])
      await expectRefusal(await call(dpop), "invalid_dpop_proof");
  });

  test("RFC 9449 §7.1 no proof, two proofs → 401 invalid_dpop_proof", async () => {
    await expectRefusal(await call(), "invalid_dpop_proof");
    const dpop = await proofOf(rows[0]!, "GET", url(), token);
    await expectRefusal(await call(`${dpop}, ${dpop}`), "invalid_dpop_proof");
  });

  test("RFC 9449 §7.2 a bound token as Bearer → 401 invalid_token, the error at Bearer", async () => {
    const dpop = await proofOf(rows[0]!, "GET", url(), token);
    const answer = await call(dpop, token, "Bearer");
    const { dpop: atDpop, bearer } = challenges(answer);
    expect([answer.status, bearer!["error"], atDpop!["error"]]).toEqual([
      401,
      "invalid_token",
      undefined,
    ]);
  });

  test("RFC 9449 §7.1 a token that is not bound, as DPoP → 401 invalid_token", async () => {
    const unbound = await tokenOf("client", { cnf: undefined });
    const dpop = await proofOf(rows[0]!, "GET", url(), unbound);
    await expectRefusal(await call(dpop, unbound), "invalid_token");
  });

  test("RFC 9449 §11.1 a proof twice → 401, also with another token's memory", async () => {
    const dpop = await proofOf(rows[0]!, "GET", url(), token);
    expect((await call(dpop)).status).toBe(200);
    await expectRefusal(await call(dpop), "invalid_dpop_proof");
  });

  test("RFC 9449 §11.1 a proof is used up only if the token has the scope", async () => {
    const weak = await tokenOf("client", { scope: "none" });
    const dpop = await proofOf(rows[0]!, "GET", url(), weak);
    for (const _ of [1, 2]) expect((await call(dpop, weak)).status).toBe(403);
  });

  test("RFC 9449 §7.1 the scheme in any case, with a remembered token", async () => {
    for (const scheme of ["DPoP", "dpop", "DPOP", "DPoP"])
      expect((await call(await proofOf(rows[0]!, "GET", url(), token), token, scheme)).status).toBe(
        200,
      );
  });
});

test("RFC 9449 §4.3 the algorithms of the settings and no other, at both servers", async () => {
  const acceptedAlgorithms = ["PS256"];
  const own = await idp({
    clients,
    acceptedAlgorithms,
    clock: () => now,
    signingKeys: { ...keys },
  });
  const htu = own.tokenEndpoint;
  for (const [by, status] of [
    [rsa, 200],
    [holder, 400],
  ] as const) {
    const headers = {
      authorization: basic("client", "secret"),
      dpop: await proof(by, "POST", htu),
    };
    const answer = await post(htu, { grant_type: "client_credentials" }, headers);
    expect(answer.status).toBe(status);
  }
});

const keys = {
  algorithms: ["PS256"],
  rotationSeconds: 86_400,
  retentionSeconds: 3_600,
  pollSeconds: 10,
  maxAgeSeconds: 60,
  refreshSeconds: 300,
  coolDownSeconds: 5,
};
