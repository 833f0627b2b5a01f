/**
 * private_key_jwt: a client authenticates at the token endpoint with an assertion that it signs
 * (RFC 7521, RFC 7523). Each row is one deviation from an assertion that is accepted.
 */

import { beforeAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import { post } from "../support/http.ts";
import { assertion, assertionType, Issuer, key, type Key } from "../support/jwt.ts";
import { idp } from "../support/servers.ts";

type Idp = Awaited<ReturnType<typeof idp>>;

const registration = {
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 600,
};
const one = await key("ES256", "one");
const two = await key("ES256", "two");
const rsa = await key("PS256", "rsa");
const stranger = await key("ES256", "one");
const published = new Issuer([one]);
let now = Date.now();
let server: Idp;

beforeAll(async () => {
  const jwks = (...keys: Key[]) => ({ keys: keys.map(({ publicJwk }) => publicJwk) });
  server = await idp({
    clock: () => now,
    clients: [
      { ...registration, client_id: "app", jwks: jwks(one) },
      { ...registration, client_id: "several", jwks: jwks(one, two) },
      {
        ...registration,
        client_id: "narrow",
        jwks: jwks(one, rsa),
        token_endpoint_auth_signing_alg: "PS256",
      },
      {
        ...registration,
        client_id: "with secret",
        client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }],
      },
    ],
  });
});

/** Requests a token with an assertion, and what `more` adds or takes away. */
async function request(
  client_assertion: string,
  more: Record<string, string | undefined> = {},
  at = server,
) {
  const parameters = {
    grant_type: "client_credentials",
    client_assertion_type: assertionType,
    client_assertion,
    ...more,
  };
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined);
  return await post(at.tokenEndpoint, Object.fromEntries(given) as Record<string, string>);
}

const seconds = () => Math.floor(now / 1000);

type Changes = Record<string, unknown>;

/** Rows: claims that replace those of a valid assertion, and header members. */
const rows: [name: string, status: number, claims: () => Changes, header?: Changes][] = [
  ["RFC 7523 §2.2 a valid assertion", 200, () => ({})],
  ["RFC 7523 §3 (1) no iss", 401, () => ({ iss: undefined })],
  ["RFC 7523 §3 (1) another iss", 401, () => ({ iss: "several" })],
  ["RFC 7523 §3 (2) no sub", 401, () => ({ sub: undefined })],
  ["RFC 7523 §3 (2) another sub", 401, () => ({ sub: "several" })],
  ["RFC 7523 §3 (2) an unknown sub", 401, () => ({ iss: "nobody", sub: "nobody" })],
  ["RFC 7523 §3 (3) no aud", 401, () => ({ aud: undefined })],
  ["RFC 7523 §3 (3) the token endpoint as aud", 401, () => ({ aud: server.tokenEndpoint })],
  ["RFC 7523 §3 (3) another server as aud", 401, () => ({ aud: "https://other.example.com" })],
  ["RFC 7523 §3 (3) the issuer in a list", 200, () => ({ aud: [server.url] })],
  [
    "RFC 7523 §3 (3) a list of two",
    401,
    () => ({ aud: [server.url, "https://other.example.com"] }),
  ],
  ["RFC 7523 §3 (3) an empty list", 401, () => ({ aud: [] })],
  ["RFC 7523 §3 (3) the issuer with a slash", 401, () => ({ aud: `${server.url}/` })],
  ["RFC 7523 §3 (4) no exp", 401, () => ({ exp: undefined })],
  ["RFC 7523 §3 (4) exp as text", 401, () => ({ exp: "9999999999" })],
  ["RFC 7523 §3 (4) expired by less than the leeway", 200, () => ({ exp: seconds() - 29 })],
  ["RFC 7523 §3 (4) expired by the leeway", 401, () => ({ exp: seconds() - 30 })],
  ["RFC 7523 §3 (4) exp in 10 minutes and the leeway", 200, () => ({ exp: seconds() + 630 })],
  ["RFC 7523 §3 (4) exp a second later", 401, () => ({ exp: seconds() + 631 })],
  ["RFC 7523 §3 (5) nbf ahead by the leeway", 200, () => ({ nbf: seconds() + 30 })],
  ["RFC 7523 §3 (5) nbf a second later", 401, () => ({ nbf: seconds() + 31 })],
  ["RFC 7523 §3 (6) no iat", 200, () => ({ iat: undefined })],
  ["RFC 7523 §3 (6) iat ahead by the leeway", 200, () => ({ iat: seconds() + 30 })],
  ["RFC 7523 §3 (6) iat a second later", 401, () => ({ iat: seconds() + 31 })],
  ["RFC 7523 §3 (7) no jti", 401, () => ({ jti: undefined })],
  ["RFC 7523 §3 (7) an empty jti", 401, () => ({ jti: "" })],
  ["RFC 7523 §3 (7) a number as jti", 401, () => ({ jti: 1 })],
  ["RFC 7523 §3 (8) further claims", 200, () => ({ more: ["of", "them"] })],
  ["RFC 7515 §4.1.4 no kid, one key", 200, () => ({}), { kid: undefined }],
  ["RFC 7515 §4.1.4 an unknown kid", 401, () => ({}), { kid: "none" }],
  ["RFC 7515 §4.1.11 crit", 401, () => ({}), { crit: ["b64"], b64: true }],
  ["RFC 8725 §3.11 no typ", 200, () => ({}), { typ: undefined }],
  ["RFC 8725 §3.11 typ JWT", 200, () => ({}), { typ: "JWT" }],
  ["RFC 8725 §3.11 typ as a media type", 200, () => ({}), { typ: "application/jwt" }],
  ["RFC 8725 §3.11 typ in capitals", 200, () => ({}), { typ: "CLIENT-AUTHENTICATION+JWT" }],
  ["RFC 8725 §3.11 typ dpop+jwt", 401, () => ({}), { typ: "dpop+jwt" }],
  ["RFC 8725 §3.11 typ at+jwt", 401, () => ({}), { typ: "at+jwt" }],
  ["RFC 8725 §3.11 typ oauth-authz-req+jwt", 401, () => ({}), { typ: "oauth-authz-req+jwt" }],
  ["RFC 8725 §3.11 typ jwtx", 401, () => ({}), { typ: "jwtx" }],
  ["RFC 8725 §3.11 a list as typ", 401, () => ({}), { typ: ["JWT"] }],
];

describe("POST /connect/token", () => {
  for (const [name, status, claims, header] of rows)
    test(`${name} → ${status}${status === 200 ? "" : " invalid_client"}`, async () => {
      const valid = { iat: seconds(), exp: seconds() + 60 };
      const jwt = await assertion(one, "app", server.url, { ...valid, ...claims() }, header);
      const answer = await request(jwt);
      expect(answer.status).toBe(status);
      if (status === 200) return expect(answer.json.token_type).toBe("Bearer");
      expect(answer.json.error).toBe("invalid_client");
      expect(answer.headers.get("www-authenticate")).toStartWith(`Basic realm="${server.url}"`);
      const { reason, client_id } = server.lines.at(-1)!;
      expect(reason).toMatch(/^["A-Z].{10,}/);
      expect(JSON.stringify(server.lines.at(-1))).not.toContain(jwt);
      expect([undefined, "app", "several"]).toContain(client_id);
    });

  const valid = async (signer = one, client_id = "app", header = {}) =>
    await assertion(signer, client_id, server.url, { iat: seconds(), exp: seconds() + 60 }, header);

  const forms: [
    name: string,
    more: Record<string, string | undefined>,
    status: number,
    code?: string,
  ][] = [
    ["RFC 7521 §4.2 client_id that agrees", { client_id: "app" }, 200],
    ["RFC 7521 §4.2 another client_id", { client_id: "several" }, 400, "invalid_request"],
    ["RFC 7523 §2.2 no type", { client_assertion_type: undefined }, 401, "invalid_client"],
    ["RFC 7523 §2.2 another type", { client_assertion_type: "x" }, 401, "invalid_client"],
    ["RFC 7523 §2.2 the type alone", { client_assertion: undefined }, 401, "invalid_client"],
    ["RFC 7523 §2.2 no JWT", { client_assertion: "x" }, 401, "invalid_client"],
    ["RFC 7523 §2.2 five parts", { client_assertion: "a.b.c.d.e" }, 401, "invalid_client"],
    ["RFC 6749 §2.3 a secret too", { client_secret: "x" }, 400, "invalid_request"],
  ];
  for (const [name, more, status, code] of forms)
    test(`${name} → ${status} ${code ?? ""}`, async () => {
      const answer = await request(await valid(), more);
      expect([answer.status, answer.json.error]).toEqual([status, code]);
    });

  test("RFC 7523 §3 (9) another key, alg none, HS256 with the public key → 401", async () => {
    const claims = { iss: "app", sub: "app", aud: server.url, exp: seconds() + 60, jti: "x" };
    const none = new jose.UnsecuredJWT(claims).encode();
    const secret = new TextEncoder().encode(JSON.stringify(one.publicJwk));
    const hmac = await new jose.SignJWT(claims)
      .setProtectedHeader({ alg: "HS256", kid: "one" })
      .sign(secret);
    for (const jwt of [await valid(stranger), none, hmac])
      expect((await request(jwt)).status).toBe(401);
  });

  test("RFC 7515 §4.1.4 no kid, several keys → 401; with kid → 200", async () => {
    expect((await request(await valid(two, "several"))).status).toBe(200);
    expect((await request(await valid(two, "several", { kid: undefined }))).status).toBe(401);
  });

  test("RFC 7591 §2 token_endpoint_auth_signing_alg narrows the algorithms", async () => {
    expect((await request(await valid(rsa, "narrow"))).status).toBe(200);
    expect((await request(await valid(one, "narrow"))).status).toBe(401);
  });

  test("RFC 7523 §3 a client without keys → 401", async () =>
    expect((await request(await valid(one, "with secret"))).status).toBe(401));

  test("RFC 7523 §3 (7) twenty times at once, and once more → one token", async () => {
    const jwt = await valid();
    const statuses = await Promise.all(
      Array.from({ length: 20 }, async () => (await request(jwt)).status),
    );
    expect(statuses.filter((status) => status === 200).length).toBe(1);
    expect(statuses.filter((status) => status === 401).length).toBe(19);
    expect((await request(jwt)).status).toBe(401);
    expect(server.lines.at(-1)).toMatchObject({ error: "invalid_client", client_id: "app" });
  });

  test("RFC 7523 §3 (7) one jti of two clients → two tokens", async () => {
    const claims = { jti: "shared", iat: seconds(), exp: seconds() + 60 };
    for (const client_id of ["app", "several"]) {
      const jwt = await assertion(one, client_id, server.url, claims);
      expect((await request(jwt)).status).toBe(200);
    }
  });
});

describe("POST /connect/token, RFC 7591 §2 jwks_uri", () => {
  const client = { ...registration, client_id: "app", jwks_uri: `${published.server.url}jwks` };
  const times = { pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 };
  const signingKeys = {
    ...times,
    algorithms: ["ES256"],
    rotationSeconds: 86_400,
    retentionSeconds: 3_600,
  };

  /** A server with a clock of its own, whose client publishes `keys`. */
  async function begin(...keys: Key[]) {
    const time = { ms: Date.now() };
    published.answer = undefined;
    published.jwks = { keys: keys.map(({ publicJwk }) => publicJwk) };
    published.requests.length = 0;
    const own = await idp({ clients: [client], signingKeys, clock: () => time.ms });
    const ask = async (signer: Key, header = {}) => {
      const iat = Math.floor(time.ms / 1000);
      const jwt = await assertion(signer, "app", own.url, { iat, exp: iat + 60 }, header);
      return await request(jwt, {}, own);
    };
    return { own, time, ask, status: async (signer: Key) => (await ask(signer)).status };
  }

  test("published keys are fetched once, and new ones when they are old", async () => {
    const { status, time } = await begin(one);
    expect([await status(one), await status(one)]).toEqual([200, 200]);
    expect(published.requests.length).toBe(1);
    published.jwks = { keys: [two.publicJwk] };
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
    published.answer = () => new Response("no", { status: 500 });
    const answer = await ask(one);
    expect([answer.status, answer.json.error]).toEqual([503, "temporarily_unavailable"]);
    expect(answer.headers.get("retry-after")).toMatch(/^\d+$/);
    published.answer = undefined;
    expect(await status(one)).toBe(503); // within the cool-down of the failure
    time.ms += 5_000;
    expect(await status(one)).toBe(200);
    published.answer = () => new Response("no", { status: 500 });
    time.ms += 86_400_000;
    expect(await status(one)).toBe(200);
    time.ms += 1_000;
    expect(await status(one)).toBe(503);
  });

  test("an empty set withdraws all keys; junk, a redirect and an endless answer do not", async () => {
    const { status, time } = await begin(one);
    expect(await status(one)).toBe(200);
    const big = "x".repeat(1_048_577);
    for (const answer of [
      () => new Response("{"),
      () => Response.json({}),
      () => Response.json({ keys: [{ kty: "oct", k: "AA" }] }),
      () => Response.redirect(published.url),
      () => new Response(big),
    ]) {
      published.answer = answer;
      time.ms += 301_000;
      expect(await status(one)).toBe(200);
    }
    published.answer = () => Response.json({ keys: [] });
    time.ms += 301_000;
    expect(await status(one)).toBe(401);
  });
});
