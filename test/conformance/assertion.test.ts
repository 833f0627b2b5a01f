/**
 * private_key_jwt: a client authenticates at the token endpoint with an assertion that it signs
 * (RFC 7521, RFC 7523). Each row is one deviation from an assertion that is accepted.
 */

import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { padded, post, refusalOf } from "../support/http.ts";
import { assertion, assertionType, Issuer, key, type Key } from "../support/jwt.ts";
import { secondsNow, signSymmetric } from "../support/jwt.ts";
import { idp } from "../support/servers.ts";

const [registered] = authorizationServer.clients;
const { client_secrets, ...registration } = registered!;
const [one, two, rsa] = [await key("ES256", "one"), await key("ES256", "two"), await key("PS256")];
const stranger = await key("ES256", "one");
const now = secondsNow();
const other = "https://other.example.com";
const jwks = (...keys: Key[]) => ({ keys: keys.map(({ publicJwk }) => publicJwk) });
const narrow = { jwks: jwks(one, rsa), token_endpoint_auth_signing_alg: "PS256" };
const server = await idp({
  clock: () => now * 1000,
  clients: [
    { ...registration, client_id: "app", jwks: jwks(one) },
    { ...registration, client_id: "several", jwks: jwks(one, two) },
    { ...registration, client_id: "narrow", ...narrow },
    { ...registration, client_id: "with secret", client_secrets: client_secrets! },
  ],
});

/** Requests a token with an assertion, and what `more` adds, changes or takes away. */
async function request(client_assertion: string, more: Changes = {}, at = server) {
  const grant_type = "client_credentials";
  const valid = { grant_type, client_assertion_type: assertionType, client_assertion };
  return await post(at.tokenEndpoint, JSON.parse(JSON.stringify({ ...valid, ...more })));
}

type Changes = Record<string, unknown>;

/** Rows: 200, or what the log names as wrong; claims in place of those of a valid assertion; a header. */
type Expected = 200 | RegExp;
const rows: [rule: string, expected: Expected, claims: Changes, header?: Changes][] = [
  ["RFC 7523 §2.2 a valid assertion", 200, {}],
  ["RFC 7523 §3 (1) no iss", /"iss"/, { iss: undefined }],
  ["RFC 7523 §3 (1) another iss", /"iss"/, { iss: "several" }],
  ["RFC 7523 §3 (2) no sub", /unknown/, { sub: undefined }],
  ["RFC 7523 §3 (2) another sub", /"iss"/, { sub: "several" }],
  ["RFC 7523 §3 (2) an unknown sub", /unknown/, { iss: "nobody", sub: "nobody" }],
  ["RFC 7523 §3 (3) no aud", /aud/, { aud: undefined }],
  ["RFC 7523 §3 (3) Choice: no token endpoint", /aud/, { aud: server.tokenEndpoint }],
  ["RFC 7523 §3 (3) another server as aud", /aud/, { aud: other }],
  ["RFC 7523 §3 (3) the issuer in a list", 200, { aud: [server.url] }],
  ["RFC 7523 §3 (3) Choice: a list of two", /aud/, { aud: [server.url, other] }],
  ["RFC 7523 §3 (3) an empty list", /aud/, { aud: [] }],
  ["RFC 7523 §3 (3) the issuer with a slash", /aud/, { aud: `${server.url}/` }],
  ["RFC 7523 §3 (4) no exp", /"exp"/, { exp: undefined }],
  ["RFC 7523 §3 (4) exp as text", /"exp"/, { exp: "9999999999" }],
  ["RFC 7523 §3 (4) expired by less than the leeway", 200, { exp: now - 29 }],
  ["RFC 7523 §3 (4) expired by the leeway", /"exp"/, { exp: now - 30 }],
  ["RFC 7523 §3 (4) exp in 10 minutes and the leeway", 200, { exp: now + 630 }],
  ["RFC 7523 §3 (4) Choice: exp a second later", /exp of/, { exp: now + 631 }],
  ["RFC 7523 §3 (5) nbf ahead by the leeway", 200, { nbf: now + 30 }],
  ["RFC 7523 §3 (5) nbf a second later", /"nbf"/, { nbf: now + 31 }],
  ["RFC 7523 §3 (6) no iat", 200, { iat: undefined }],
  ["RFC 7523 §3 (6) iat ahead by the leeway", 200, { iat: now + 30 }],
  ["RFC 7523 §3 (6) Choice: iat a second later", /iat/, { iat: now + 31 }],
  ["RFC 7523 §3 (7) Choice: no jti", /jti/, { jti: undefined }],
  ["RFC 7523 §3 (7) an empty jti", /jti/, { jti: "" }],
  ["RFC 7523 §3 (7) a number as jti", /jti/, { jti: 1 }],
  ["RFC 7523 §3 (8) further claims", 200, { more: ["of", "them"] }],
  ["RFC 7515 §4.1.4 no kid, one key", 200, {}, { kid: undefined }],
  ["RFC 7515 §4.1.4 an unknown kid", /key/, {}, { kid: "none" }],
  ["RFC 7515 §4.1.11 crit", /crit/, {}, { crit: ["b64"], b64: true }],
  ["RFC 8725 §3.11 no typ", 200, {}, { typ: undefined }],
  ["RFC 8725 §3.11 typ JWT", 200, {}, { typ: "JWT" }],
  ["RFC 8725 §3.11 typ as a media type", 200, {}, { typ: "application/jwt" }],
  ["RFC 8725 §3.11 typ in capitals", 200, {}, { typ: "CLIENT-AUTHENTICATION+JWT" }],
  ["RFC 8725 §3.11 typ dpop+jwt", /typ/, {}, { typ: "dpop+jwt" }],
  ["RFC 8725 §3.11 typ at+jwt", /typ/, {}, { typ: "at+jwt" }],
  ["RFC 8725 §3.11 typ oauth-authz-req+jwt", /typ/, {}, { typ: "oauth-authz-req+jwt" }],
  ["RFC 8725 §3.11 typ jwtx", /typ/, {}, { typ: "jwtx" }],
  ["RFC 8725 §3.11 a list as typ", /typ/, {}, { typ: ["JWT"] }],
];

for (const [rule, expected, claims, header] of rows)
  test(`POST /connect/token, ${rule} → ${expected === 200 ? 200 : 401}`, async () => {
    const times = { iat: now, exp: now + 60 };
    const jwt = await assertion(one, "app", server.url, { ...times, ...claims }, header);
    const answer = await request(jwt);
    if (expected === 200) return expect(answer.json.token_type).toBe("Bearer");
    expect(refusalOf(answer)).toBe("401 invalid_client");
    const sub = "sub" in claims ? claims["sub"] : "app";
    const client_id = ["app", "several"].find((id) => id === sub); // the log names no stranger
    const { reason, ...line } = server.lines.at(-1)!;
    expect([line["client_id"], reason]).toEqual([client_id, expect.stringMatching(expected)]);
    expect(JSON.stringify(server.lines.at(-1))).not.toContain(jwt);
  });

const valid = async (signer = one, client_id = "app", header = {}, more = {}) => {
  const times = { iat: now, exp: now + 60 };
  return await assertion(signer, client_id, server.url, { ...times, ...more }, header);
};
/** A valid assertion but for how it is signed. */
const claims = { iss: "app", sub: "app", aud: server.url, exp: now + 60, jti: "x" };
const symmetric = () => signSymmetric(JSON.stringify(one.publicJwk), claims, { kid: "one" });
const unsigned = async () => new jose.UnsecuredJWT(claims).encode();
const noKid = { kid: undefined };
const shared = { jti: "shared" };
const signing_alg = "OpenID Connect Registration §2 token_endpoint_auth_signing_alg";

const requests: [rule: string, expected: Expected, jwt: () => Promise<string>, more?: Changes][] = [
  ["RFC 7521 §4.2 client_id that agrees", 200, valid, { client_id: "app" }],
  ["RFC 7523 §2.2 no type", /client_assertion_type/, valid, { client_assertion_type: undefined }],
  ["RFC 7523 §2.2 another type", /client_assertion_type/, valid, { client_assertion_type: "x" }],
  ["RFC 7523 §2.2 the type alone", /client_assertion/, valid, { client_assertion: undefined }],
  ["RFC 7523 §2.2 no JWT", /client_assertion/, async () => "x"],
  ["RFC 7523 §2.2 five parts", /client_assertion/, async () => "a.b.c.d.e"],
  ["RFC 7523 §3 (9) another key", /signature/, () => valid(stranger)],
  ["RFC 7523 §3 (9) HS256 with the public key", /alg/, symmetric],
  ["RFC 7523 §3 (9) alg none", /alg/, unsigned],
  ["RFC 7523 §3 a client without keys", /key/, () => valid(one, "with secret")],
  ["RFC 7515 §4.1.4 one of several keys", 200, () => valid(two, "several")],
  ["RFC 7515 §4.1.4 Choice: no kid, several keys", /key/, () => valid(two, "several", noKid)],
  [`${signing_alg}, the only one of the client`, 200, () => valid(rsa, "narrow")],
  [`${signing_alg}, another one`, /alg/, () => valid(one, "narrow")],
  ["RFC 7523 §3 (7) a jti", 200, () => valid(one, "app", {}, shared)],
  ["RFC 7523 §3 (7) it again", /jti/, () => valid(one, "app", {}, shared)],
  ["RFC 7523 §3 (7) it of another client", 200, () => valid(one, "several", {}, shared)],
];

for (const [rule, expected, jwt, more] of requests)
  test(`POST /connect/token, ${rule} → ${expected === 200 ? 200 : 401}`, async () => {
    const answer = await request(await jwt(), more);
    if (expected === 200) return expect(answer.status).toBe(200);
    expect(refusalOf(answer)).toBe("401 invalid_client");
    expect(server.lines.at(-1)!["reason"]).toMatch(expected);
  });

test("POST /connect/token, RFC 7521 §4.2 another client_id, RFC 6749 §2.3 a secret too → 400", async () => {
  for (const more of [{ client_id: "several" }, { client_secret: "x" }])
    expect(refusalOf(await request(await valid(), more))).toBe("400 invalid_request");
});

test("POST /connect/token, RFC 7523 §3 (7) twenty times at once, and once more → one token", async () => {
  const jwt = await valid();
  const all = await Promise.all(Array.from({ length: 20 }, () => request(jwt)));
  const statuses = all.map(({ status }) => status).sort();
  expect(statuses).toEqual([200, ...Array(19).fill(401)]);
  expect((await request(jwt)).status).toBe(401);
  expect(server.lines.at(-1)).toMatchObject({ error: "invalid_client", client_id: "app" });
});

describe("POST /connect/token, RFC 7591 §2 jwks_uri", () => {
  const published = new Issuer([]);
  const client = { ...registration, client_id: "app", jwks_uri: `${published.url}/jwks` };

  /** A server with a clock of its own, whose client publishes `keys`. */
  async function begin(...keys: Key[]) {
    const time = { ms: Date.now() };
    published.answer = undefined;
    published.jwks = jwks(...keys);
    published.requests.length = 0;
    const own = await idp({ clients: [client], clock: () => time.ms });
    const ask = async (signer: Key, header = {}) => {
      const iat = Math.floor(time.ms / 1000);
      const jwt = await assertion(signer, "app", own.url, { iat, exp: iat + 60 }, header);
      return await request(jwt, {}, own);
    };
    return { time, ask, status: async (signer: Key) => (await ask(signer)).status };
  }

  test("published keys are fetched once, and new ones when they are old", async () => {
    const { status, time } = await begin(one);
    expect([await status(one), await status(one)]).toEqual([200, 200]);
    expect(published.requests.length).toBe(1);
    published.publish(two.publicJwk);
    time.ms += 300_000;
    expect(await status(one)).toBe(200); // not older than the refresh
    time.ms += 1_000;
    expect([await status(two), await status(one)]).toEqual([200, 401]);
  });

  test("an unknown kid within the cool-down fetches nothing", async () => {
    const { status } = await begin(one);
    expect([await status(one), await status(two), await status(two)]).toEqual([200, 401, 401]);
    expect(published.requests.length).toBe(1);
  });

  test("no kid: one key published → 200, two → 401", async () => {
    expect((await (await begin(one)).ask(one, { kid: undefined })).status).toBe(200);
    expect((await (await begin(one, two)).ask(one, { kid: undefined })).status).toBe(401);
  });

  test("out of reach, and nothing known → 503 with Retry-After; known → they stay for a day", async () => {
    const { ask, status, time } = await begin(one);
    const down = () => new Response("no", { status: 500 });
    published.answer = down;
    const answer = await ask(one);
    expect([answer.status, answer.json.error]).toEqual([503, "temporarily_unavailable"]);
    expect(answer.headers.get("retry-after")).toMatch(/^\d+$/);
    published.answer = undefined;
    expect(await status(one)).toBe(503); // within the cool-down of the failure
    time.ms += 5_000;
    expect(await status(one)).toBe(200);
    published.answer = down;
    time.ms += 86_400_000;
    expect(await status(one)).toBe(200);
    time.ms += 1_000;
    expect(await status(one)).toBe(503);
  });

  test("an empty set withdraws all keys; junk, a redirect and over 1 MiB do not", async () => {
    const { status, time } = await begin(one);
    expect(await status(one)).toBe(200);
    const elsewhere = new Issuer([]); // there is an empty set
    for (const answer of [
      () => new Response("{"),
      () => Response.json({}),
      () => Response.json({ keys: [{ kty: "oct", k: "AA" }] }),
      () => Response.redirect(`${elsewhere.url}/jwks`),
      () => padded({ keys: [] }, 1_048_577),
    ]) {
      published.answer = answer;
      time.ms += 301_000;
      expect(await status(one)).toBe(200);
    }
    expect(elsewhere.requests).toEqual([]);
    published.answer = () => padded({ keys: [] }, 1_048_576);
    time.ms += 301_000;
    expect(await status(one)).toBe(401);
  });
});
