/**
 * A client like the FAPI 2.0 Security Profile wants it: a key instead of a secret, bound tokens, one
 * algorithm, ten minutes. It gets nothing by any weaker way. And every accepted algorithm, end to end.
 */

import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { basic, post, send } from "../support/http.ts";
import { assertion, assertionType, key, type Key, proof } from "../support/jwt.ts";
import { api, idp, pair } from "../support/servers.ts";

const registration = {
  grant_types: ["client_credentials"],
  scope: "api1",
  access_token_lifetime_seconds: 600,
};

describe("POST /connect/token, FAPI 2.0 §5.3", async () => {
  const strong = await key("PS256");
  const weak = await key("ES256");
  const server = await idp({
    clients: [
      {
        ...registration,
        client_id: "payments",
        jwks: { keys: [strong.publicJwk, weak.publicJwk] },
        token_endpoint_auth_signing_alg: "PS256",
        dpop_bound_access_tokens: true,
      },
    ],
  });
  const grant_type = "client_credentials";
  const url = server.tokenEndpoint;
  const withAssertion = async (signer: Key) => ({
    grant_type,
    client_assertion_type: assertionType,
    client_assertion: await assertion(signer, "payments", server.url),
  });
  const dpop = async () => await proof(strong, "POST", url);

  test("its key and a proof → 200, bound, ten minutes", async () => {
    const { status, json } = await post(url, await withAssertion(strong), { dpop: await dpop() });
    expect([status, json.token_type, json.expires_in]).toEqual([200, "DPoP", 600]);
  });

  test("no proof → 400 invalid_dpop_proof", async () =>
    expect((await post(url, await withAssertion(strong))).json.error).toBe("invalid_dpop_proof"));

  test("a key of another algorithm, a secret, nothing → 401 invalid_client", async () => {
    const headers = async () => ({ dpop: await dpop() });
    const secret = { ...(await headers()), authorization: basic("payments", "secret") };
    const inForm = { grant_type, client_id: "payments", client_secret: "secret" };
    for (const answer of [
      await post(url, await withAssertion(weak), await headers()),
      await post(url, { grant_type }, secret),
      await post(url, inForm, await headers()),
      await post(url, { grant_type, client_id: "payments" }, await headers()),
    ])
      expect([answer.status, answer.json.error]).toEqual([401, "invalid_client"]);
  });
});

describe("RFC 7518 §3.1, RFC 8037 §3.1: every accepted algorithm, end to end", () => {
  for (const alg of authorizationServer.acceptedAlgorithms)
    test(`${alg} signs tokens, assertions and proofs`, async () => {
      const own = await key(alg);
      const signingKeys = { ...authorizationServer.signingKeys, algorithms: [alg] };
      const clients = [{ ...registration, client_id: "app", jwks: { keys: [own.publicJwk] } }];
      const { idp: tokens, api: calls } = await pair({ idp: { clients, signingKeys } });
      const body = async () => ({
        grant_type: "client_credentials",
        client_assertion_type: assertionType,
        client_assertion: await assertion(own, "app", tokens.url),
      });
      const { access_token } = (await post(tokens.tokenEndpoint, await body())).json;
      expect(jose.decodeProtectedHeader(access_token)).toMatchObject({ alg, typ: "at+jwt" });
      const headers = { authorization: `Bearer ${access_token}` };
      expect((await send(`${calls.url}/identity`, { headers })).status).toBe(200);
      // ML-DSA keys name their algorithm, so the embedded key keeps its alg here.
      const header = { jwk: own.publicJwk };
      const dpop = await proof(own, "POST", tokens.tokenEndpoint, undefined, {}, header);
      const bound = await post(tokens.tokenEndpoint, await body(), { dpop });
      expect(bound.json.token_type).toBe("DPoP");
    });

  test("RFC 9068 §2.1 a signing key of each configured algorithm is published, the first signs", async () => {
    const algorithms = ["RS256", "ES256"];
    const signingKeys = { ...authorizationServer.signingKeys, algorithms };
    const server = await idp({ signingKeys });
    const { json } = await send(`${server.url}/.well-known/openid-configuration/jwks`);
    const published = json.keys.map(({ alg }: { alg: string }) => alg).sort();
    expect(published).toEqual(["ES256", "ES256", "RS256", "RS256"]);
    const answer = await post(
      server.tokenEndpoint,
      { grant_type: "client_credentials" },
      { authorization: basic("client", "secret") },
    );
    expect(jose.decodeProtectedHeader(answer.json.access_token).alg).toBe("RS256");
    const calls = await api(server.url, { resource: "http://127.0.0.1:0" });
    const headers = { authorization: `Bearer ${answer.json.access_token}` };
    expect((await send(`${calls.url}/identity`, { headers })).status).toBe(401); // another audience
  });
});
