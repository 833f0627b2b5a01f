/**
 * DPoP (RFC 9449) at both servers: a proof binds a token to a key at the token endpoint, and shows
 * with every call that the caller has that key. Each row is one deviation from a valid proof.
 */

import { expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { type Answer, basic, callRefusalOf, post, refusalOf, send } from "../support/http.ts";
import { accessToken, Issuer, type Key, key, proof, secondsNow } from "../support/jwt.ts";
import { api as startApi, idp as startIdp } from "../support/servers.ts";

const [holder, other, signer] = [await key(), await key(), await key()];
const rsa = await key("PS256");
const grant_type = "client_credentials";
const now = secondsNow();
const clock = () => now * 1000;

const [client] = authorizationServer.clients;
const bound = { ...client!, client_id: "bound", dpop_bound_access_tokens: true };
const clients = [client!, bound];
const idp = await startIdp({ clients, clock });
const issuer = new Issuer([signer]);
const api = await startApi(issuer.url, { clock });
const identity = `${api.url}/identity`;

/** The claim of a token that is bound to a key. */
const cnfOf = async ({ publicJwk }: Key) => ({ jkt: await jose.calculateJwkThumbprint(publicJwk) });
const tokenWith = async (claims = {}, by = holder) =>
  await accessToken(signer, issuer.url, api.url, { cnf: await cnfOf(by), ...claims });
const [token, tokenOfRsa] = [await tokenWith(), await tokenWith({}, rsa)];

/** Requests a token with a proof, or without one. */
async function request(dpop?: string, client_id = "client") {
  const headers = { authorization: basic(client_id, "secret"), ...(dpop && { dpop }) };
  return await post(idp.tokenEndpoint, { grant_type }, headers);
}

/** Calls the API with a proof, or without one, and a token. */
async function call(dpop?: string, access_token = token, scheme = "DPoP", query = "") {
  const headers = { authorization: `${scheme} ${access_token}`, ...(dpop && { dpop }) };
  return await send(identity + query, { headers });
}

/** Proofs for one and the other, valid but for some claims and members of the header. */
type Members = Record<string, unknown>;
const forToken = async (claims: Members = {}, header: Members = {}, by = holder) =>
  await proof(by, "POST", idp.tokenEndpoint, undefined, { iat: now, ...claims }, header);
const forCall = async (claims: Members = {}, header: Members = {}, by = holder, of = token) =>
  await proof(by, "GET", identity, of, { iat: now, ...claims }, header);

/** Expects a refusal with a reason in the log, and no token. */
function expectRefusal(answer: Answer, said: RegExp, refusal = "401 invalid_dpop_proof at dpop") {
  expect(callRefusalOf(answer)).toBe(refusal);
  const { client_id, reason } = api.lines.at(-1)!;
  expect([client_id, reason]).toEqual(["client", expect.stringMatching(said)]);
  expect(JSON.stringify(api.lines.at(-1))).not.toContain(token);
}

// --- What holds at both servers ------------------------------------------------------------------

const { d } = holder.privateJwk;
const { kid: _kid, alg: _alg, ...publicJwk } = holder.publicJwk;
const { kid: _k, alg: _a, ...rsaJwk } = rsa.publicJwk;
const longJwk = { ...rsaJwk, n: "x".repeat(1_366) };
/** Members of a private or symmetric key. Beside those of a public one, some pass jose. */
const secretMembers = ["p", "q", "dp", "dq", "qi", "oth", "k", "priv"];

/** 200, or what the log of either server names as wrong. */
type Expected = 200 | RegExp;
type Row = [rule: string, expected: Expected, claims: Members, header?: Members, by?: Key];
const rows: Row[] = [
  ["RFC 9449 §5, RFC 9449 §7.1 a valid proof", 200, {}],
  ["RFC 9449 §4.3 (3) no htm", /\[null/, { htm: undefined }],
  ["RFC 9449 §4.3 (3) no htu", /,null\]/, { htu: undefined }],
  ["RFC 9449 §4.3 (3) no iat", /iat/, { iat: undefined }],
  ["RFC 9449 §4.3 (3) iat as text", /iat/, { iat: String(now) }],
  ["RFC 9449 §4.3 (3) no jti", /jti/, { jti: undefined }],
  ["RFC 9449 §4.3 (3) an empty jti", /jti/, { jti: "" }],
  ["RFC 9449 §4.3 (3) a number as jti", /jti/, { jti: 7 }],
  ["RFC 9449 §4.3 (4) no typ", /typ/, {}, { typ: undefined }],
  ["RFC 9449 §4.3 (4) typ JWT", /typ/, {}, { typ: "JWT" }],
  ["RFC 9449 §4.3 (4) typ at+jwt", /typ/, {}, { typ: "at+jwt" }],
  ["RFC 9449 §4.3 (6) signed by another key", /signature/, {}, { jwk: publicJwk }, other],
  ["RFC 9449 §4.3 (6) no jwk", /jwk/, {}, { jwk: undefined }],
  ["RFC 9449 §4.3 (7) a private key", /jwk/, {}, { jwk: { ...publicJwk, d } }],
  ["RFC 9449 §4.3 (6) a list as x", /jwk/, {}, { jwk: { ...publicJwk, x: [publicJwk.x] } }],
  ["RFC 9449 §4.3 Choice: no key of 8192 bits", /4096/, {}, { jwk: longJwk }, rsa],
  ["RFC 9449 §4.3 (8) another method", /\["PUT"/, { htm: "PUT" }],
  ["RFC 9449 §4.3 (8) the method in small letters", /\["post"/, { htm: "post" }],
  ["RFC 9449 §4.3 (8) an object as htm", /\[\{/, { htm: { toString: 1 } }],
  ["RFC 9449 §4.3 (9) an object as htu", /,\{/, { htu: { toString: 1 } }],
  ["RFC 9449 §4.3 (9) another host", /a\.example/, { htu: "https://a.example/x" }],
  ["RFC 9449 §4.3 (9) no URL", /"identity"/, { htu: "identity" }],
  ["RFC 9449 §4.3 (11) iat 90 s ago", 200, { iat: now - 90 }],
  ["RFC 9449 §4.3 (11) iat 91 s ago", /iat/, { iat: now - 91 }],
  ["RFC 9449 §4.3 (11) iat in 30 s", 200, { iat: now + 30 }],
  ["RFC 9449 §4.3 (11) iat in 31 s", /iat/, { iat: now + 31 }],
  ["RFC 7519 §4.1.4 exp, not reached", 200, { exp: now + 9 }],
  ["RFC 7519 §4.1.4 exp, long ago", /"exp"/, { exp: now - 31 }],
  ["RFC 7515 §4.1.11 crit", /crit/, {}, { crit: ["b64"], b64: true }],
  ["RFC 9449 §4.2 further claims", 200, { nonce: "x", more: [1] }],
  ["RFC 9449 §4.3 (5) a key of another algorithm", 200, {}, {}, rsa],
  ...secretMembers.map((name): Row => {
    const rule = `RFC 9449 §4.3 (7) ${name} beside a public key`;
    const jwk = { ...rsaJwk, [name]: name === "oth" ? [] : "AQAB" };
    return [rule, /key/, {}, { jwk }, rsa];
  }),
];

for (const [rule, expected, claims, header = {}, by = holder] of rows) {
  const isValid = expected === 200;
  test(`POST /connect/token, ${rule} → ${isValid ? 200 : "400 invalid_dpop_proof"}`, async () => {
    const answer = await request(await forToken(claims, header, by));
    if (isValid) {
      expect([answer.status, answer.json.token_type]).toEqual([200, "DPoP"]);
      return expect(jose.decodeJwt(answer.json.access_token)["cnf"]).toEqual(await cnfOf(by));
    }
    expect(refusalOf(answer)).toBe("400 invalid_dpop_proof");
    const { client_id, reason } = idp.lines.at(-1)!;
    expect([client_id, reason]).toEqual(["client", expect.stringMatching(expected)]);
    expect(reason).not.toContain("it is undefined");
  });

  test(`GET /identity, ${rule} → ${isValid ? 200 : "401 invalid_dpop_proof"}`, async () => {
    const presented = by === rsa ? tokenOfRsa : token;
    const answer = await call(await forCall(claims, header, by, presented), presented);
    if (isValid) return expect(answer.status).toBe(200);
    expectRefusal(answer, expected);
  });
}

// --- At the token endpoint -----------------------------------------------------------------------

const urls: [name: string, htu: string, status: number][] = [
  ["a query and a fragment", `${idp.tokenEndpoint}?a=b#c`, 200],
  ["the scheme and host in capitals", idp.tokenEndpoint.replace("http", "HTTP"), 200],
  ["dots in the path", idp.tokenEndpoint.replace("/token", "/x/../token"), 200],
  ["a slash at the end", `${idp.tokenEndpoint}/`, 400],
  ["the path in capitals", idp.tokenEndpoint.replace("token", "TOKEN"), 400],
  ["another port", idp.tokenEndpoint.replace(/:\d+/, ":1"), 400],
  ["https", idp.tokenEndpoint.replace("http", "https"), 400],
];

for (const [name, htu, status] of urls)
  test(`POST /connect/token, RFC 9449 §4.3 (9) htu with ${name} → ${status}`, async () =>
    expect((await request(await forToken({ htu }))).status).toBe(status));

test("POST /connect/token, RFC 9449 §4.3 (1) two proofs, (2) no JWT → 400 invalid_dpop_proof", async () => {
  for (const dpop of [`${await forToken()}, ${await forToken()}`, "x", "a.b.c"])
    expect(refusalOf(await request(dpop))).toBe("400 invalid_dpop_proof");
});

test("POST /connect/token, RFC 9449 §11.1 a proof ten times at once, and again → one token", async () => {
  const dpop = await forToken();
  const all = await Promise.all(Array.from({ length: 10 }, () => request(dpop)));
  expect(all.map(({ status }) => status).sort()).toEqual([200, ...Array(9).fill(400)]);
  expect(refusalOf(await request(dpop))).toBe("400 invalid_dpop_proof");
});

test("POST /connect/token, RFC 9449 §11.1 one jti under two keys → two tokens", async () => {
  for (const by of [holder, other])
    expect((await request(await forToken({ jti: "same" }, {}, by))).status).toBe(200);
});

test("POST /connect/token, RFC 9449 §5.2 a client registered for bound tokens → no other", async () => {
  expect(refusalOf(await request(undefined, "bound"))).toBe("400 invalid_dpop_proof");
  expect((await request(await forToken(), "bound")).json.token_type).toBe("DPoP");
  expect((await request()).json.token_type).toBe("Bearer");
});

// --- At the API ----------------------------------------------------------------------------------

const weak = await tokenWith({ scope: "none" });
const unbound = await tokenWith({ cnf: undefined });
const second = await tokenWith();

const refused: [rule: string, said: RegExp, make: () => Promise<string | undefined>][] = [
  ["RFC 9449 §4.3 (8) the method in small letters", /\["get"/, () => forCall({ htm: "get" })],
  ["RFC 9449 §4.3 (9) another path", /\/health"/, () => forCall({ htu: `${api.url}/health` })],
  ["RFC 9449 §4.3 (12) no ath", /ath/, () => forCall({ ath: undefined })],
  ["RFC 9449 §4.3 (12) another ath", /ath/, () => forCall({}, {}, holder, second)],
  ["RFC 9449 §4.3 (12) another key", /key/, () => forCall({}, {}, other)],
  ["RFC 9449 §7.1 no proof", /JW/, async () => undefined],
  ["RFC 9449 §7.1 two proofs", /JW/, async () => `${await forCall()}, ${await forCall()}`],
];

for (const [rule, said, make] of refused)
  test(`GET /identity, ${rule} → 401 invalid_dpop_proof`, async () =>
    expectRefusal(await call(await make()), said));

test("GET /identity, RFC 9449 §4.3 (9) the query does not count → 200", async () =>
  expect((await call(await forCall(), token, "DPoP", "?a=b")).status).toBe(200));

const atBearer = "401 invalid_token at bearer";
test("GET /identity, RFC 9449 §7.2 a bound token as Bearer → 401 invalid_token, at Bearer", async () =>
  expectRefusal(await call(await forCall(), token, "Bearer"), /scheme/, atBearer));

test("GET /identity, RFC 9449 §7.1 a token that is not bound, as DPoP → 401 invalid_token", async () => {
  const answer = await call(await forCall({}, {}, holder, unbound), unbound);
  expectRefusal(answer, /scheme/, "401 invalid_token at dpop");
});

test("GET /identity, RFC 9449 §11.1 a proof twice → 401 invalid_dpop_proof", async () => {
  const dpop = await forCall();
  expect((await call(dpop)).status).toBe(200);
  expectRefusal(await call(dpop), /used/);
});

test("GET /identity, RFC 9449 §11.1 a proof is used up only if the token has the scope", async () => {
  const dpop = await forCall({}, {}, holder, weak);
  for (const _ of [1, 2]) expect((await call(dpop, weak)).status).toBe(403);
});

test("GET /identity, RFC 9449 §7.1 the scheme in any case, with a remembered token → 200", async () => {
  for (const scheme of ["DPoP", "dpop", "DPOP", "DPoP"])
    expect((await call(await forCall(), token, scheme)).status).toBe(200);
});

test("POST /connect/token, RFC 9449 §4.3 (5) the algorithms of the settings, and no other", async () => {
  const acceptedAlgorithms = ["PS256"];
  const signingKeys = { ...authorizationServer.signingKeys, algorithms: acceptedAlgorithms };
  const own = await startIdp({ clients, acceptedAlgorithms, signingKeys });
  const headers = { authorization: basic("client", "secret") };
  const askBy = async (by: Key) => {
    const dpop = await proof(by, "POST", own.tokenEndpoint);
    return await post(own.tokenEndpoint, { grant_type }, { ...headers, dpop });
  };
  expect((await askBy(rsa)).status).toBe(200);
  expect(refusalOf(await askBy(holder))).toBe("400 invalid_dpop_proof");
});

test("GET /identity, RFC 9449 §4.3 (5) the algorithms of the settings, and no other", async () => {
  const issuer = new Issuer([rsa]);
  const own = await startApi(issuer.url, { clock, acceptedAlgorithms: ["PS256"] });
  const callBy = async (by: Key) => {
    const access_token = await accessToken(rsa, issuer.url, own.url, { cnf: await cnfOf(by) });
    const dpop = await proof(by, "GET", `${own.url}/identity`, access_token, { iat: now });
    const headers = { authorization: `DPoP ${access_token}`, dpop };
    return await send(`${own.url}/identity`, { headers });
  };
  expect((await callBy(rsa)).status).toBe(200);
  expect(callRefusalOf(await callBy(holder))).toBe("401 invalid_dpop_proof at dpop");
});

test("GET /identity, RFC 9449 §11.1 a client that floods forgets its own proofs, no other's", async () => {
  const small = await startApi(issuer.url, { clock, maxUsedProofs: 10 });
  const cnf = { cnf: await cnfOf(holder) };
  const callAs = async (client_id: string) => {
    const bearer = await accessToken(signer, issuer.url, small.url, { client_id, ...cnf });
    const dpop = await proof(holder, "GET", `${small.url}/identity`, bearer, { iat: now });
    const headers = { authorization: `DPoP ${bearer}`, dpop };
    return async () => (await send(`${small.url}/identity`, { headers })).status;
  };
  const victims = [await callAs("victim"), await callAs("victim")];
  const floods = await Promise.all(Array.from({ length: 9 }, () => callAs("flooder")));
  for (const first of [...victims, ...floods]) expect(await first()).toBe(200);
  // Of eleven proofs the oldest of the flooder is forgotten, and no other.
  for (const again of [...victims, ...floods.slice(1)]) expect(await again()).toBe(401);
  expect(await floods[0]!()).toBe(200);
  expect(await floods[1]!()).toBe(200); // it pushed that one out
});
