/**
 * One whole exchange, to be read from top to bottom: a client finds the authorization server, gets
 * an access token from it, and calls the API; then what is refused.
 *
 * There are three parties. The client is this file. The authorization server (idp.ts) knows the
 * client, and gives it a token. The resource server (api.ts) does not know the client; it knows the
 * authorization server's keys, and accepts whoever brings a token that was signed with one of them.
 */

import { afterAll, expect, test } from "bun:test";
import { pair } from "../support/servers.ts";

// Both servers run here, each at a port of its own, and both believe that it is 15 January 2027.
const clock = () => 1_800_000_000_000;
const { idp, api } = await pair({ idp: { clock }, api: { clock } });
afterAll(() => Promise.all([idp.stop(), api.stop()]));

// --- 1 The client asks where things are ----------------------------------------------------------

// Of the issuer a client needs to know the URL alone. The rest stands in a document at a well-known
// place under it. (At /.well-known/oauth-authorization-server there is the same one.)
const discovery = await fetch(`${idp.url}/.well-known/openid-configuration`);
const metadata: any = await discovery.json();

test("1. GET metadata, OpenID Connect Discovery §4, RFC 8414 §3.2 → 200, the issuer's endpoints and keys", () => {
  expect(discovery.status).toBe(200);
  // The issuer in the document must be the one that was asked, to the letter (RFC 8414 §3.3).
  expect(metadata.issuer).toBe(idp.url);
  expect(metadata.token_endpoint).toBe(`${idp.url}/connect/token`);
  expect(metadata.jwks_uri).toBe(`${idp.url}/.well-known/openid-configuration/jwks`);
});

// --- 2 The client asks for a token ---------------------------------------------------------------

// The request is a form. The client says who it is by HTTP Basic with its id and secret (both
// form-encoded, which changes nothing here), and that it acts for itself: no user is involved.
const form = { "content-type": "application/x-www-form-urlencoded" };
const tokenResponse = await fetch(metadata.token_endpoint, {
  method: "POST",
  headers: { ...form, authorization: `Basic ${btoa("client:secret")}` },
  body: "grant_type=client_credentials&scope=api1",
});
const { access_token, ...described }: any = await tokenResponse.json();
const decode = (part: string) => JSON.parse(Buffer.from(part, "base64url").toString());

test("2. POST token request, RFC 6749 §4.4 → 200, an access token", () => {
  expect(tokenResponse.status).toBe(200);
  // "Bearer" means that whoever has the token can use it, so nothing on the way may keep it.
  expect(described).toEqual({ token_type: "Bearer", expires_in: 3600, scope: "api1" });
  expect(tokenResponse.headers.get("cache-control")).toBe("no-store");
});

test("2. the access token, RFC 9068 §2 → who may do what, where, and until when", () => {
  // A JWT is three parts in base64url: header, claims, signature. The client need not look into it:
  // the token is made for the API. Here we do.
  const [header, claims] = access_token.split(".").slice(0, 2).map(decode);
  expect(header).toEqual({
    alg: "ES256", // how it is signed
    kid: expect.any(String), // with which of the issuer's keys
    typ: "at+jwt", // an access token, and no other kind of JWT
  });
  expect(claims).toEqual({
    iss: idp.url, // who made it
    sub: "client", // whom it speaks of: without a user, the client itself
    aud: api.url, // who may accept it: this API, and no other
    client_id: "client", // who asked for it
    scope: "api1", // what it allows
    iat: 1_800_000_000, // when it was made, in seconds since 1970
    nbf: 1_800_000_000, // from when on it counts
    exp: 1_800_003_600, // until when: an hour later
    jti: expect.any(String), // its own name, to find it in logs
  });
});

// --- 3 The client calls the API ------------------------------------------------------------------

test("3. GET /identity with the token, RFC 6750 §2.1 → 200, the caller's claims", async () => {
  // The API fetches the issuer's public keys (jwks_uri above) at the first call, and every five
  // minutes from then on. It checks signatures itself, and never asks the issuer about a token.
  const authorization = `Bearer ${access_token}`;
  const answer = await fetch(`${api.url}/identity`, { headers: { authorization } });
  expect(answer.status).toBe(200);
  const claims: any = await answer.json();
  expect(claims).toContainEqual({ type: "client_id", value: "client" });
  expect(claims).toContainEqual({ type: "scope", value: "api1" });
});

// --- What is refused -----------------------------------------------------------------------------

test("4. GET /identity without a token, RFC 6750 §3 → 401, how to ask", async () => {
  const answer = await fetch(`${api.url}/identity`);
  expect(answer.status).toBe(401);
  // The challenge says which scheme is wanted, and where the API describes itself (RFC 9728 §5.1).
  // It has no `error`, for nothing was wrong with what was sent: nothing was sent.
  const challenge = answer.headers.get("www-authenticate");
  expect(challenge).toMatch(/^Bearer /);
  expect(challenge).toContain(`="${api.url}/.well-known/oauth-protected-resource"`);
  expect(challenge).not.toContain("error=");
});

test("5. GET /identity with a changed token, RFC 6750 §3.1 → 401 invalid_token", async () => {
  // Somebody makes the token last longer. The signature is for other claims, so it does not hold.
  const [header, claims, signature] = access_token.split(".");
  const changed = JSON.stringify({ ...decode(claims), exp: 1_900_000_000 });
  const forged = `${header}.${Buffer.from(changed).toString("base64url")}.${signature}`;
  const headers = { authorization: `Bearer ${forged}` };
  const answer = await fetch(`${api.url}/identity`, { headers });
  expect(answer.status).toBe(401);
  expect(answer.headers.get("www-authenticate")).toContain('error="invalid_token"');
});

test("6. POST token request with a wrong secret, RFC 6749 §5.2 → 401 invalid_client", async () => {
  const answer = await fetch(metadata.token_endpoint, {
    method: "POST",
    headers: { ...form, authorization: `Basic ${btoa("client:guess")}` },
    body: "grant_type=client_credentials",
  });
  expect(answer.status).toBe(401);
  expect(answer.headers.get("www-authenticate")).toStartWith("Basic realm=");
  expect(await answer.json()).toMatchObject({ error: "invalid_client" });
});
