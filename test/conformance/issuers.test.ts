/**
 * Identity servers as companies have them, each played with its own kind of metadata, keys and tokens:
 * what api.ts and client.ts take from them by settings alone, and what they refuse.
 */

import { expect, test } from "bun:test";
import type { ClientSettings } from "../../config.ts";
import { challenges } from "../support/http.ts";
import { accessToken, Issuer, key } from "../support/jwt.ts";
import { api, tokenSource } from "../support/servers.ts";

const [old, current] = await Promise.all([key("RS256", "old"), key("RS256", "current")]);
const encryption = { ...old.publicJwk, kid: "enc", use: "enc", alg: "RSA-OAEP", x5c: ["AAAA"] };

type Members = Record<string, unknown>;

interface Provider {
  /** What stands behind the origin in its issuer. */
  path: string;
  jwks: string;
  token: string;
  metadata?: Members;
  /** What its JWK Set has in each key. */
  jwk?: Members;
  /** Claims and header of its tokens, where RFC 9068 has others or they differ from it. */
  claims: Members;
  header?: Members;
  client?: Partial<ClientSettings>;
}

/** Plays it; resolves with the API's answer to a client of it, and with the API's reason if any. */
async function play(provider: Provider, claims: Members = {}, header: Members = {}) {
  const issuer = new Issuer([], provider.path);
  const { origin } = new URL(issuer.url);
  const { url, lines } = await api(issuer.url);
  issuer.metadata = {
    issuer: issuer.url,
    jwks_uri: origin + provider.jwks,
    token_endpoint: origin + provider.token,
    authorization_endpoint: `${origin}/authorize`,
    id_token_signing_alg_values_supported: ["RS256"],
    ...provider.metadata,
  };
  const keys = [old, current].map(({ publicJwk }) => ({ ...publicJwk, ...provider.jwk }));
  const own = { ...provider.claims, ...claims };
  const type = { ...provider.header, ...header };
  const access_token = await accessToken(current, issuer.url, url, own, type);
  const response = { access_token, token_type: "Bearer", expires_in: 3599, ext_expires_in: 3599 };
  const requests: string[] = [];
  issuer.answer = async (request) => {
    const { pathname } = new URL(request.url);
    if (pathname === provider.jwks) return Response.json({ keys: [encryption, ...keys] });
    if (pathname !== provider.token) return undefined;
    requests.push(await request.text());
    return Response.json(response);
  };
  const tokens = tokenSource(issuer.url, { resource: url, ...provider.client });
  const answer = await tokens.fetch(`${url}/identity`);
  const { status, headers } = answer;
  const { error } = challenges({ status, headers, text: "", json: {} })["bearer"] ?? {};
  return { status, error, reason: lines[0]?.["reason"], requests };
}

const keycloak: Provider = {
  path: "/realms/main",
  jwks: "/realms/main/protocol/openid-connect/certs",
  token: "/realms/main/protocol/openid-connect/token",
  metadata: { dpop_signing_alg_values_supported: ["PS384", "ES256"], mtls_endpoint_aliases: {} },
  jwk: { use: "sig", x5c: ["AAAA"], x5t: "AAAA", "x5t#S256": "AAAA" },
  claims: { azp: "client", scope: "profile api1 email", realm_access: { roles: ["user"] } },
};
const auth0: Provider = {
  path: "/",
  jwks: "/.well-known/jwks.json",
  token: "/oauth/token",
  jwk: { use: "sig", x5c: ["AAAA"], x5t: "AAAA" },
  claims: { sub: "client@clients", permissions: ["api1"] },
};
const entra: Provider = {
  path: "/11111111-2222-3333-4444-555555555555/v2.0",
  jwks: "/11111111-2222-3333-4444-555555555555/discovery/v2.0/keys",
  token: "/11111111-2222-3333-4444-555555555555/oauth2/v2.0/token",
  metadata: { tenant_region_scope: "EU", cloud_instance_name: "example.com" },
  jwk: { use: "sig", alg: undefined, x5c: ["AAAA"], issuer: "https://example.com" },
  claims: {
    ...{ client_id: undefined, jti: undefined, scope: undefined },
    ...{ azp: "client", roles: ["api1"] },
  },
  header: { typ: "JWT" },
  client: { scope: "api://orders/.default" },
};
const duende: Provider = {
  path: "",
  jwks: "/.well-known/openid-configuration/jwks",
  token: "/connect/token",
  jwk: { use: "sig" },
  claims: { scope: ["api1", "api2"], nbf: 0 },
};

for (const [name, provider] of Object.entries({ keycloak, auth0, duende }))
  test(`${name}, RFC 9068 §2 tokens of that profile → 200`, async () => {
    const { status, reason } = await play(provider);
    expect({ status, reason }).toEqual({ status: 200, reason: undefined });
  });

/** The RFC numbers in the names say which rule a default of that server breaks. */
const refuses = (name: string, says: RegExp, provider: Provider, claims = {}, header = {}) =>
  test(`${name} → 401 invalid_token`, async () => {
    const { status, error, reason } = await play(provider, claims, header);
    expect({ status, error }).toEqual({ status: 401, error: "invalid_token" });
    expect(reason).toMatch(says);
  });
const plain = { typ: "JWT" };
refuses("Keycloak, RFC 9068 §4 without its at+jwt switch", /typ/, keycloak, {}, plain);
refuses("Keycloak, RFC 9068 §4 without an audience mapper", /aud/, keycloak, { aud: "account" });
refuses("Auth0, RFC 9068 §4 without its profile for that", /typ/, auth0, {}, plain);
refuses("Entra ID, RFC 9068 §4 whose typ is JWT", /typ/, entra);
refuses("Entra ID, RFC 9068 §2.2 no client_id", /client_id/, entra, {}, { typ: "at+jwt" });
refuses("Duende, RFC 9068 §2.2 no sub, as for machines", /sub/, duende, { sub: undefined });

test("Auth0, RFC 6750 §3.1 permissions that are no scope → 403 insufficient_scope", async () => {
  const { status, error } = await play(auth0, { scope: undefined });
  expect({ status, error }).toEqual({ status: 403, error: "insufficient_scope" });
});

test("Entra ID, RFC 6749 §4.4.2 the client sends SCOPE as it is, and takes the token", async () => {
  const { requests } = await play(entra);
  expect(new URLSearchParams(requests[0]).get("scope")).toBe("api://orders/.default");
});
