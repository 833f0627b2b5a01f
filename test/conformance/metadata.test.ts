/**
 * What the authorization server publishes: its metadata (RFC 8414), its keys (RFC 7517) and its
 * health. Whatever the metadata advertises is asked for here, and works.
 */

import { afterAll, describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { basic, challenges, fieldsOf, post, refusalOf, send } from "../support/http.ts";
import { assertion, assertionType, type Key, key, proof } from "../support/jwt.ts";
import { idp as startIdp, resource as myApi } from "../support/servers.ts";

const algorithms = authorizationServer.acceptedAlgorithms;
const orders = "https://orders.example.com/v1";
const scopes = [
  { scope: "read", description: "Reading orders", resource: orders },
  { scope: "write", description: "Writing orders", resource: orders },
  { scope: "api1", description: "My API", resource: myApi },
];

/** A key for each accepted algorithm; making one for RSA takes long, so there is one for all. */
const rsa = await key("RS256");
async function keyFor(alg: string): Promise<Key> {
  if (!/^[RP]S/.test(alg)) return await key(alg);
  const privateJwk = { ...rsa.privateJwk, alg, kid: alg };
  const privateKey = (await jose.importJWK(privateJwk)) as jose.CryptoKey;
  return { alg, privateKey, privateJwk, publicJwk: { ...rsa.publicJwk, alg, kid: alg } };
}
const keys = await Promise.all(algorithms.map(keyFor));

const [client] = authorizationServer.clients;
const { client_secrets: _secrets, ...registration } = { ...client!, scope: "read write api1" };
const jwks = { keys: keys.map(({ publicJwk }) => publicJwk) };
const clients = [
  { ...client!, scope: "read write api1" },
  { ...registration, client_id: "keyed", jwks },
];

const idp = await startIdp({ scopes, clients });
afterAll(() => idp.stop());
const wellKnown = "/.well-known/openid-configuration";
const documents = [wellKnown, "/.well-known/oauth-authorization-server", `${wellKnown}/jwks`];
const metadata = (await send(idp.url + wellKnown)).json;

const methods = ["client_secret_basic", "client_secret_post", "private_key_jwt"];
/** What a server with this issuer and these settings advertises. */
const expected = (issuer: string, accepted = algorithms) => ({
  issuer,
  jwks_uri: `${issuer}/.well-known/openid-configuration/jwks`,
  token_endpoint: `${issuer}/connect/token`,
  scopes_supported: ["read", "write", "api1"],
  response_types_supported: [],
  grant_types_supported: ["client_credentials"],
  token_endpoint_auth_methods_supported: methods,
  token_endpoint_auth_signing_alg_values_supported: accepted,
  dpop_signing_alg_values_supported: accepted,
  protected_resources: [orders, myApi],
});

// --- Documents -----------------------------------------------------------------------------------

describe("documents", () => {
  for (const path of documents) {
    test(`GET ${path}, RFC 8414 §3.2 → 200, JSON that may be cached for a minute`, async () => {
      const answer = await send(idp.url + path);
      const { "content-length": length, "content-type": type, ...others } = fieldsOf(answer);
      expect([answer.status, Number(length)]).toEqual([200, Buffer.byteLength(answer.text)]);
      expect(type).toMatch(/^application\/json(;|$)/);
      expect(others).toEqual({ "cache-control": "public, max-age=60" });
    });
  }

  for (const path of documents.slice(0, 2))
    test(`GET ${path}, RFC 8414 §2 → what is configured`, async () =>
      expect((await send(idp.url + path)).json).toEqual(expected(idp.url)));

  for (const path of [...documents, "/health"]) {
    test(`GET ${path}, RFC 9110 §4.2.2 with a query → the same`, async () => {
      const { status, text } = await send(`${idp.url}${path}?x=/connect/token`);
      expect([status, text]).toEqual([200, (await send(idp.url + path)).text]);
    });

    test(`HEAD ${path}, RFC 9110 §9.3.2 → as GET, without the body`, async () => {
      const answer = await send(idp.url + path, { method: "HEAD" });
      expect([answer.status, answer.text]).toEqual([200, ""]);
      expect(fieldsOf(answer)).toEqual(fieldsOf(await send(idp.url + path)));
    });

    for (const method of ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
      test(`${method} ${path}, RFC 9110 §15.5.6 → 405, Allow: GET, HEAD`, async () => {
        const answer = await send(idp.url + path, { method });
        expect([answer.status, answer.json]).toEqual([405, undefined]);
        const plain = { "cache-control": "no-store", pragma: "no-cache", allow: "GET, HEAD" };
        expect(fieldsOf(answer)).toMatchObject(plain);
      });
  }

  test("GET metadata, RFC 8414 §2 other settings → what is configured now", async () => {
    const { signingKeys } = authorizationServer;
    const changed = await startIdp({
      ...{ issuer: "https://auth.example.com", listen: "127.0.0.1:0", scopes, clients },
      ...{ acceptedAlgorithms: ["ES256", "PS512"] },
      signingKeys: { ...signingKeys, maxAgeSeconds: 7 },
    });
    const url = `http://127.0.0.1:${changed.server.port}`;
    for (const path of documents) {
      const answer = await send(url + path);
      expect(answer.headers.get("cache-control")).toBe("public, max-age=7");
      if (!path.endsWith("/jwks"))
        expect(answer.json).toEqual(expected("https://auth.example.com", ["ES256", "PS512"]));
    }
    await changed.stop();
  });
});

// --- The JWK Set ---------------------------------------------------------------------------------

describe("GET jwks_uri", async () => {
  /** RFC 7518 §6, RFC 8037 §2, and the post-quantum algorithms: the members of a public key. */
  const members: [alg: string, kty: string, ...members: string[]][] = [
    ["ES256", "EC", "crv", "x", "y"],
    ["RS256", "RSA", "n", "e"],
    ["EdDSA", "OKP", "crv", "x"],
    ["ML-DSA-44", "AKP", "pub"],
  ];

  // Started outside of a test, for on a busy machine keys for RSA take their time.
  const algorithms = members.map(([alg]) => alg);
  const signingKeys = { ...authorizationServer.signingKeys, algorithms };
  const server = await startIdp({ signingKeys });
  afterAll(() => server.stop());

  test("RFC 7517 §4 → public members alone, kid, alg and use; a key and its successor", async () => {
    const { keys, ...others } = (await send(`${server.url}${wellKnown}/jwks`)).json;
    expect(others).toEqual({});
    expect(keys).toHaveLength(2 * members.length);
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
  });
});

// --- What is advertised works --------------------------------------------------------------------

describe("what the metadata advertises", () => {
  const grant = { grant_type: "client_credentials", scope: "api1" };
  const secret = { client_id: "client", client_secret: "secret" };
  const ask = (parameters: Record<string, string>, headers: Record<string, string> = {}) =>
    post(metadata.token_endpoint, { ...grant, ...parameters }, headers);
  const signedBy = async (signer: Key, issuer = idp.url) => ({
    client_assertion_type: assertionType,
    client_assertion: await assertion(signer, "keyed", issuer),
  });

  test("RFC 8414 §2 every URL → an answer; there are no others", async () => {
    const urls = Object.keys(metadata).filter((name) => /_(uri|endpoint)$/.test(name));
    expect(urls.toSorted()).toEqual(["jwks_uri", "token_endpoint"]);
    expect((await send(metadata.jwks_uri)).status).toBe(200);
    expect((await send(metadata.token_endpoint)).status).toBe(405);
  });

  test("RFC 8414 §2 every authentication method → 200", async () => {
    const authorization = basic("client", "secret");
    const ways: Record<string, () => ReturnType<typeof ask>> = {
      client_secret_basic: () => ask({}, { authorization }),
      client_secret_post: () => ask(secret),
      private_key_jwt: async () => ask(await signedBy(keys[0]!)),
    };
    for (const method of metadata.token_endpoint_auth_methods_supported)
      expect((await ways[method]!()).status).toBe(200);
  });

  test("RFC 8414 §2 every grant type, scope and resource → 200, as asked for", async () => {
    for (const grant_type of metadata.grant_types_supported)
      expect((await ask({ ...secret, grant_type })).status).toBe(200);
    for (const scope of metadata.scopes_supported)
      expect((await ask({ ...secret, scope })).json.scope).toBe(scope);
    for (const resource of metadata.protected_resources) {
      const { access_token } = (await ask({ ...secret, resource, scope: "" })).json;
      expect(jose.decodeJwt(access_token).aud).toBe(resource);
    }
  });

  for (const signer of keys) {
    test(`RFC 7523 §3 an assertion signed with ${signer.alg} → 200`, async () => {
      const advertised = metadata.token_endpoint_auth_signing_alg_values_supported;
      expect(advertised).toContain(signer.alg);
      expect((await ask(await signedBy(signer))).status).toBe(200);
    });

    test(`RFC 9449 §5 a proof signed with ${signer.alg} → 200, a token of type DPoP`, async () => {
      expect(metadata.dpop_signing_alg_values_supported).toContain(signer.alg);
      const header = { jwk: signer.publicJwk };
      const dpop = await proof(signer, "POST", metadata.token_endpoint, undefined, {}, header);
      expect((await ask(secret, { dpop })).json.token_type).toBe("DPoP");
    });
  }

  // --- An issuer with a path ---------------------------------------------------------------------

  describe("an issuer with a path", async () => {
    const server = await startIdp({ issuer: "http://127.0.0.1:0/auth", scopes, clients });
    afterAll(() => server.stop());
    const { origin } = new URL(server.url);

    const found = [
      ["RFC 8414 §3.1 between host and path", "/.well-known/oauth-authorization-server/auth"],
      ["OpenID Connect Discovery §4 after the path", "/auth/.well-known/openid-configuration"],
    ];
    for (const [rule, path] of found)
      test(`GET ${path}, ${rule} → 200, the metadata`, async () => {
        expect(server.url).toBe(`${origin}/auth`);
        const answer = await send(origin + path);
        expect([answer.status, answer.json]).toEqual([200, expected(server.url)]);
      });

    const notFound = [
      ...["/connect/token", "/health", "/auth", "/auth/", "/authx/health", "/auth/auth/health"],
      ...documents,
      ...["/auth/.well-known/oauth-authorization-server", `${wellKnown}/auth`, `${wellKnown}/jwks`],
    ];
    for (const path of notFound)
      test(`GET ${path}, RFC 8414 §3.1 → 404`, async () =>
        expect((await send(origin + path)).status).toBe(404));

    test("RFC 9068 §2.2 token, keys, health and challenge → all under the path", async () => {
      expect((await send(`${origin}/auth/health`)).json).toEqual({ status: "ok" });
      const { access_token } = (await post(server.tokenEndpoint, { ...grant, ...secret })).json;
      const published = (await send(`${origin}/auth${wellKnown}/jwks`)).json;
      const options = { issuer: `${origin}/auth` };
      await jose.jwtVerify(access_token, jose.createLocalJWKSet(published), options);
      const refused = await post(server.tokenEndpoint, grant);
      expect(refusalOf(refused)).toBe("401 invalid_client");
      expect(challenges(refused)["basic"]).toEqual({ realm: server.url, charset: "UTF-8" });
    });

    test("RFC 7523 §3, RFC 9449 §4.3 aud and htu → the issuer and the endpoint with the path", async () => {
      const ask = async (issuer: string, htu: string) => {
        const parameters = { ...grant, ...(await signedBy(keys[0]!, issuer)) };
        const dpop = await proof(keys[0]!, "POST", htu);
        return (await post(server.tokenEndpoint, parameters, { dpop })).status;
      };
      expect(await ask(server.url, server.tokenEndpoint)).toBe(200);
      expect(await ask(origin, server.tokenEndpoint)).toBe(401);
      expect(await ask(server.url, `${origin}/connect/token`)).toBe(400);
    });
  });
});

// --- Health --------------------------------------------------------------------------------------

test("GET /health → 200 ok, not cached", async () => {
  const answer = await send(`${idp.url}/health`);
  expect([answer.status, answer.json]).toEqual([200, { status: "ok" }]);
  expect(answer.headers.get("cache-control")).toBe("no-store");
});
