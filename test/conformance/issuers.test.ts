/**
 * Identity servers as companies have them, each played with its own kind of metadata, keys and tokens:
 * what api.ts and client.ts take from them by settings alone, and what they refuse.
 */

import { afterAll, describe, expect, test } from "bun:test";
import type { ClientSettings } from "../../config.ts";
import { challenges, send } from "../support/http.ts";
import { accessToken, Issuer, type Key, key } from "../support/jwt.ts";
import { api, tokenSource } from "../support/servers.ts";

const [old, current, encryption] = await Promise.all(["old", "current", "enc"].map(rsaKey));
const rsa = { kid: "enc", use: "enc", alg: "RSA-OAEP", x5c: ["AAAA"], x5t: "AAAA" };

async function rsaKey(kid: string): Promise<Key> {
  return await key("RS256", kid);
}

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

const opened: { stop: (force?: boolean) => unknown }[] = [];
afterAll(() => opened.forEach(({ stop }) => void stop(true)));

/** Plays it; resolves with the API's answer to a client of it, and with the API's reason if any. */
async function play(provider: Provider, claims: Members = {}, header: Members = {}) {
  const issuer = new Issuer([], provider.path);
  const { origin } = new URL(issuer.url);
  const protectedApi = await api(issuer.url);
  opened.push(issuer.server, protectedApi.server);
  const url = protectedApi.url;
  issuer.metadata = {
    issuer: issuer.url,
    jwks_uri: origin + provider.jwks,
    token_endpoint: origin + provider.token,
    authorization_endpoint: `${origin}/authorize`,
    id_token_signing_alg_values_supported: ["RS256"],
    ...provider.metadata,
  };
  const keys = [old!, current!].map(({ publicJwk }) => ({ ...publicJwk, ...provider.jwk }));
  const jwks = { keys: [{ ...encryption!.publicJwk, ...rsa }, ...keys] };
  const own = { ...provider.claims, ...claims };
  const type = { ...provider.header, ...header };
  const requests: string[] = [];
  issuer.answer = async (request) => {
    const { pathname } = new URL(request.url);
    if (pathname === provider.jwks) return Response.json(jwks);
    if (pathname !== provider.token) return undefined;
    requests.push(await request.text());
    const access_token = await accessToken(current!, issuer.url, url, own, type);
    const more = { ext_expires_in: 3599, "not-before-policy": 0 };
    return Response.json({ access_token, token_type: "Bearer", expires_in: 3599, ...more });
  };
  const tokens = tokenSource(issuer.url, { resource: url, ...provider.client });
  const answer = await tokens.fetch(`${url}/identity`);
  const { error } = challenges({ ...answer, headers: answer.headers } as never)["bearer"] ?? {};
  const { lines } = protectedApi;
  return { status: answer.status, error, reason: lines[0]?.["reason"], requests, url };
}

/** The RFC numbers in the names say which rule a default of that server breaks. */
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
    client_id: undefined,
    jti: undefined,
    scope: undefined,
    azp: "client",
    roles: ["api1"],
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

describe.each(Object.entries({ keycloak, auth0, duende }))("%s", (_, provider) => {
  test("RFC 9068 §2 its tokens as this profile has them → 200", async () => {
    const { status, reason } = await play(provider);
    expect({ status, reason }).toEqual({ status: 200, reason: undefined });
  });
});

const refuses = (name: string, says: RegExp, provider: Provider, claims = {}, header = {}) =>
  test(`${name} → 401 invalid_token`, async () => {
    const { status, error, reason } = await play(provider, claims, header);
    expect({ status, error }).toEqual({ status: 401, error: "invalid_token" });
    expect(reason).toMatch(says);
  });
refuses("Keycloak without its at+jwt switch, RFC 9068 §4", /typ/, keycloak, {}, { typ: "JWT" });
refuses("Keycloak without an audience mapper, RFC 9068 §4", /aud/, keycloak, { aud: "account" });
refuses("Auth0 without its RFC 9068 profile", /typ/, auth0, {}, { typ: "JWT" });
refuses("Entra ID, whose typ is JWT, RFC 9068 §4", /typ/, entra);
refuses("Entra ID without client_id, RFC 9068 §2.2", /client_id/, entra, {}, { typ: "at+jwt" });
refuses("Duende without sub, as it is for machines, RFC 9068 §2.2", /sub/, duende, {
  sub: undefined,
});

test("Auth0 whose permissions are not its scope, RFC 6750 §3.1 → 403 insufficient_scope", async () => {
  const { status, error } = await play(auth0, { scope: undefined });
  expect({ status, error }).toEqual({ status: 403, error: "insufficient_scope" });
});

test("Entra ID, the client alone: SCOPE is sent as it is, and the token taken", async () => {
  const { requests } = await play(entra);
  expect(new URLSearchParams(requests[0]).get("scope")).toBe("api://orders/.default");
});

const clientRefuses = (name: string, says: string, change: (own: string) => Partial<Provider>) =>
  test(`the client, ${name} → an error`, async () => {
    const provider = { ...auth0, ...change("") };
    await expect(play(provider)).rejects.toThrow(says);
  });
clientRefuses("RFC 8414 §3.3 an issuer without the slash that it has", "issuer", () => ({
  metadata: { issuer: "https://tenant.example" },
}));
clientRefuses("RFC 9449 §5 DPOP=1 where the server binds no tokens", "token_type", () => ({
  client: { dpop: true },
}));
clientRefuses("RFC 8414 §2 a token endpoint on another host", "token_endpoint", () => ({
  metadata: { token_endpoint: "https://login.example/oauth/token" },
}));
