/**
 * A client like the FAPI 2.0 Security Profile wants it: a key instead of a secret, bound tokens, one
 * algorithm, ten minutes. It gets nothing by any weaker way. And every accepted algorithm, end to end.
 */

import { describe, expect, test } from "bun:test";
import * as jose from "jose";
import { authorizationServer } from "../../config.ts";
import { basic, post, refusalOf, send } from "../support/http.ts";
import { assertion, assertionType, key, type Key, proof } from "../support/jwt.ts";
import { idp, pair } from "../support/servers.ts";

const [client] = authorizationServer.clients;
const lifetime = { access_token_lifetime_seconds: 600 };
const { client_secrets: _secrets, ...registration } = { ...client!, ...lifetime };
const grant_type = "client_credentials";
/** A token request with an assertion. */
const asserted = async (signer: Key, client_id: string, issuer: string) => ({
  grant_type,
  client_assertion_type: assertionType,
  client_assertion: await assertion(signer, client_id, issuer),
});

describe("POST /connect/token, FAPI 2.0 Security Profile §5.3", async () => {
  const [strong, weak] = [await key("PS256"), await key("ES256")];
  const payments = {
    ...registration,
    client_id: "payments",
    jwks: { keys: [strong.publicJwk, weak.publicJwk] },
    token_endpoint_auth_signing_alg: "PS256",
    dpop_bound_access_tokens: true,
  };
  const { url, tokenEndpoint } = await idp({ clients: [payments] });
  const ask = async (parameters: Record<string, string>, headers = {}) => {
    const dpop = await proof(strong, "POST", tokenEndpoint);
    return await post(tokenEndpoint, parameters, { dpop, ...headers });
  };

  test("its key and a proof → 200, bound, ten minutes; no proof → 400 invalid_dpop_proof", async () => {
    const { status, json } = await ask(await asserted(strong, "payments", url));
    expect([status, json.token_type, json.expires_in]).toEqual([200, "DPoP", 600]);
    const answer = await post(tokenEndpoint, await asserted(strong, "payments", url));
    expect(refusalOf(answer)).toBe("400 invalid_dpop_proof");
  });

  test("a key of another algorithm, a secret, nothing → 401 invalid_client", async () => {
    const client_id = "payments";
    for (const answer of [
      await ask(await asserted(weak, client_id, url)),
      await ask({ grant_type }, { authorization: basic(client_id, "secret") }),
      await ask({ grant_type, client_id, client_secret: "secret" }),
      await ask({ grant_type, client_id }),
    ])
      expect(refusalOf(answer)).toBe("401 invalid_client");
  });
});

describe("RFC 7518 §3.1, RFC 8037 §3.1, RFC 9864: every accepted algorithm, end to end", () => {
  const unlessLong = (alg: string) =>
    alg === "ML-DSA-87" ? ", but no bound call: its fields are over the 16 KiB that Bun takes" : "";
  for (const alg of authorizationServer.acceptedAlgorithms)
    test(`${alg} signs tokens, assertions and proofs${unlessLong(alg)}`, async () => {
      const own = await key(alg);
      const signingKeys = { ...authorizationServer.signingKeys, algorithms: [alg] };
      const clients = [{ ...registration, client_id: "app", jwks: { keys: [own.publicJwk] } }];
      const { idp: tokens, api: calls } = await pair({ idp: { clients, signingKeys } });
      const [url, identity] = [tokens.tokenEndpoint, `${calls.url}/identity`];
      const answer = await post(url, await asserted(own, "app", tokens.url));
      const { access_token } = answer.json;
      expect(jose.decodeProtectedHeader(access_token)).toMatchObject({ alg, typ: "at+jwt" });
      const headers = { authorization: `Bearer ${access_token}` };
      expect((await send(identity, { headers })).status).toBe(200);
      const proven = { dpop: await proof(own, "POST", url) };
      const bound = (await post(url, await asserted(own, "app", tokens.url), proven)).json;
      const dpop = await proof(own, "GET", identity, bound.access_token);
      const authorization = `${bound.token_type} ${bound.access_token}`;
      expect(authorization).toStartWith("DPoP ");
      if (unlessLong(alg)) return;
      expect((await send(identity, { headers: { authorization, dpop } })).status).toBe(200);
    });
});
