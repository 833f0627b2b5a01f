/**
 * What the authorization server publishes: its metadata (RFC 8414), its keys (RFC 7517) and its
 * health. Whatever the metadata advertises is asked for here and works; fapi.test.ts does that for
 * each algorithm.
 */

import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { basic, challenges, fieldsOf, post, refusalOf, send } from "../support/http.ts";
import { assertion, assertionType, key, proof } from "../support/jwt.ts";
import { idp as startIdp, resource as myApi } from "../support/servers.ts";

const orders = "https://orders.example.com/v1";
const scopes = [
  { scope: "read", description: "Reading orders", resource: orders },
  { scope: "write", description: "Writing orders", resource: orders },
  { scope: "api1", description: "My API", resource: myApi },
];

const signer = await key();
const [client] = authorizationServer.clients;
const { client_secrets, ...registration } = { ...client!, scope: "read write api1" };
const clients = [
  { ...registration, client_secrets: client_secrets! },
  { ...registration, client_id: "keyed", jwks: { keys: [signer.publicJwk] } },
];

const secret = { client_id: "client", client_secret: "secret" };
const idp = await startIdp({ scopes, clients });
const wellKnown = "/.well-known/openid-configuration";
const documents = [wellKnown, "/.well-known/oauth-authorization-server", `${wellKnown}/jwks`];
const metadata = (await send(idp.url + wellKnown)).json;

/** What a server with this issuer and these settings advertises. */
const expected = (issuer: string, accepted = authorizationServer.acceptedAlgorithms) => ({
  issuer,
  jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
  token_endpoint: `${issuer}/connect/token`,
  scopes_supported: ["read", "write", "api1"],
  response_types_supported: [],
  grant_types_supported: ["client_credentials"],
  token_endpoint_auth_methods_supported: [
    ...["client_secret_basic", "client_secret_post", "private_key_jwt"],
  ],
  token_endpoint_auth_signing_alg_values_supported: accepted,
  dpop_signing_alg_values_supported: accepted,
  protected_resources: [orders, myApi],
});

// --- Documents -----------------------------------------------------------------------------------

for (const path of documents)
  test(`GET ${path}, RFC 8414 §3.2, RFC 7517 §5 → 200, JSON that may be cached for a minute`, async () => {
    const answer = await send(idp.url + path);
    const { "content-length": length, "content-type": type, ...others } = fieldsOf(answer);
    expect([answer.status, Number(length)]).toEqual([200, Buffer.byteLength(answer.text)]);
    expect(type).toMatch(/^application\/json(;|$)/);
    expect(others).toEqual({ "cache-control": "public, max-age=60" });
    if (!path.endsWith("/jwks")) expect(answer.json).toEqual(expected(idp.url));
  });

for (const path of [...documents, "/health"])
  test(`${path}, RFC 9110 §9.3.2, RFC 9110 §15.5.6 a query, HEAD → the same, others → 405`, async () => {
    const get = await send(idp.url + path);
    const { status, text } = await send(`${idp.url}${path}?x=/connect/token`);
    expect([status, text]).toEqual([200, get.text]);
    const head = await send(idp.url + path, { method: "HEAD" });
    expect([head.status, head.text, fieldsOf(head)]).toEqual([200, "", fieldsOf(get)]);
    for (const method of ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"]) {
      const answer = await send(idp.url + path, { method });
      expect([answer.status, answer.json]).toEqual([405, undefined]);
      const plain = { "cache-control": "no-store", pragma: "no-cache", allow: "GET, HEAD" };
      expect(fieldsOf(answer)).toMatchObject(plain);
    }
  });

test("GET metadata, RFC 8414 §2 other settings → what is configured now", async () => {
  const { server } = await startIdp({
    ...{ issuer: "https://auth.example.com", listen: "127.0.0.1:0", scopes, clients },
    ...{ acceptedAlgorithms: ["ES256", "PS512"] },
    signingKeys: { ...authorizationServer.signingKeys, maxAgeSeconds: 7 },
  });
  for (const path of documents) {
    const answer = await send(`http://127.0.0.1:${server.port}${path}`);
    expect(answer.headers.get("cache-control")).toBe("public, max-age=7");
    if (!path.endsWith("/jwks"))
      expect(answer.json).toEqual(expected("https://auth.example.com", ["ES256", "PS512"]));
  }
});

test("GET /health → 200 ok, not cached", async () => {
  const answer = await send(`${idp.url}/health`);
  expect([answer.status, answer.json]).toEqual([200, { status: "ok" }]);
  expect(answer.headers.get("cache-control")).toBe("no-store");
});

// --- The JWK Set ---------------------------------------------------------------------------------

/** RFC 7518 §6, RFC 8037 §2, and the post-quantum algorithms: the members of a public key. */
const members: [alg: string, kty: string, ...members: string[]][] = [
  ["ES256", "EC", "crv", "x", "y"],
  ["RS256", "RSA", "n", "e"],
  ["EdDSA", "OKP", "crv", "x"],
  ["ML-DSA-44", "AKP", "pub"],
];
const algorithms = members.map(([alg]) => alg);
// Started outside of a test, for on a busy machine keys for RSA take their time.
const many = await startIdp({
  signingKeys: { ...authorizationServer.signingKeys, algorithms },
});

test("GET jwks_uri, RFC 7517 §4 → public members alone, kid, alg, use; a key and its successor", async () => {
  const { keys, ...others } = (await send(`${many.url}${wellKnown}/jwks`)).json;
  expect([keys.length, others]).toEqual([2 * members.length, {}]);
  for (const [alg, kty, ...names] of members) {
    const pair = keys.filter((jwk: jose.JWK) => jwk.alg === alg);
    expect(pair).toHaveLength(2);
    for (const jwk of pair) {
      const all = ["kty", "kid", "alg", "use", ...names];
      expect(Object.keys(jwk).toSorted()).toEqual(all.toSorted());
      expect([jwk.kty, jwk.use]).toEqual([kty, "sig"]);
      // RFC 7638: the name of a key is its thumbprint.
      expect(jwk.kid).toBe(await jose.calculateJwkThumbprint(jwk));
    }
  }
  // The first of the algorithms signs.
  const parameters = { ...secret, grant_type: "client_credentials" };
  const { access_token } = (await post(many.tokenEndpoint, parameters)).json;
  expect(jose.decodeProtectedHeader(access_token).alg).toBe("ES256");
});

// --- What is advertised works --------------------------------------------------------------------

const grant = { grant_type: "client_credentials", scope: "api1" };
const ask = (parameters: Record<string, string>, headers: Record<string, string> = {}) =>
  post(metadata.token_endpoint, { ...grant, ...parameters }, headers);
const asserted = async (issuer = idp.url) => ({
  client_assertion_type: assertionType,
  client_assertion: await assertion(signer, "keyed", issuer),
});

test("RFC 8414 §2 every URL, method, grant type, scope and resource → works as asked for", async () => {
  const urls = Object.keys(metadata).filter((name) => /_(uri|endpoint)$/.test(name));
  expect(urls.toSorted()).toEqual(["jwks_uri", "token_endpoint"]);
  expect((await send(metadata.jwks_uri)).status).toBe(200);
  const ways: Record<string, () => ReturnType<typeof ask>> = {
    client_secret_basic: () => ask({}, { authorization: basic("client", "secret") }),
    client_secret_post: () => ask(secret),
    private_key_jwt: async () => ask(await asserted()),
  };
  for (const method of metadata.token_endpoint_auth_methods_supported)
    expect((await ways[method]!()).status).toBe(200);
  for (const grant_type of metadata.grant_types_supported)
    expect((await ask({ ...secret, grant_type })).status).toBe(200);
  for (const scope of metadata.scopes_supported)
    expect((await ask({ ...secret, scope })).json.scope).toBe(scope);
  for (const resource of metadata.protected_resources) {
    const { access_token } = (await ask({ ...secret, resource, scope: "" })).json;
    expect(jose.decodeJwt(access_token).aud).toBe(resource);
  }
});

// --- An issuer with a path -----------------------------------------------------------------------

describe("an issuer with a path", async () => {
  const issuer = "http://127.0.0.1:0/auth";
  const { url, tokenEndpoint } = await startIdp({ issuer, scopes, clients });
  const { origin } = new URL(url);

  const found = [
    ["RFC 8414 §3.1 between host and path", "/.well-known/oauth-authorization-server/auth"],
    ["OpenID Connect Discovery §4 after the path", "/auth/.well-known/openid-configuration"],
  ];
  for (const [rule, path] of found)
    test(`GET ${path}, ${rule} → 200, the metadata`, async () => {
      expect(url).toBe(`${origin}/auth`);
      const answer = await send(origin + path);
      expect([answer.status, answer.json]).toEqual([200, expected(url)]);
    });

  const notFound = [
    ...["/connect/token", "/health", "/auth", "/auth/", "/authx/health", "/auth/auth/health"],
    ...["/auth/.well-known/oauth-authorization-server", `${wellKnown}/auth`, ...documents],
  ];
  for (const path of notFound)
    test(`GET ${path}, RFC 9110 §15.5.5 → 404`, async () =>
      expect((await send(origin + path)).status).toBe(404));

  test("RFC 9068 §2.2 token, keys, health and challenge → all under the path", async () => {
    expect((await send(`${url}/health`)).json).toEqual({ status: "ok" });
    const { access_token } = (await post(tokenEndpoint, { ...grant, ...secret })).json;
    const published = (await send(`${url}${wellKnown}/jwks`)).json;
    await jose.jwtVerify(access_token, jose.createLocalJWKSet(published), { issuer: url });
    const refused = await post(tokenEndpoint, grant);
    expect(refusalOf(refused)).toBe("401 invalid_client");
    expect(challenges(refused)["basic"]).toEqual({ realm: url, charset: "UTF-8" });
  });

  test("RFC 7523 §3, RFC 9449 §4.3 aud and htu → the issuer and the endpoint with the path", async () => {
    const status = async (issuer: string, htu: string) => {
      const dpop = await proof(signer, "POST", htu);
      return (await post(tokenEndpoint, { ...grant, ...(await asserted(issuer)) }, { dpop }))
        .status;
    };
    expect(await status(url, tokenEndpoint)).toBe(200);
    expect(await status(origin, tokenEndpoint)).toBe(401);
    expect(await status(url, `${origin}/connect/token`)).toBe(400);
  });
});
