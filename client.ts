/**
 * The client (RFC 6749 §1.1): discovers the authorization server, asks it for an access token with
 * credentials of its own (§4.4), and calls the API with that. A program imports `accessToken`, or
 * `apiFetch`, which uses it.
 *
 * It authenticates with a secret or, if CLIENT_KEY names a file, with a key (RFC 7523). With DPOP=1
 * its tokens are bound to a key of this process (RFC 9449).
 * Run: bun run client.ts   (--wait: while the servers start; --new-key: make a key pair)
 */

import { hash } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import * as jose from "jose";
import { boundedFetch, client, fail, readSetting, requireOrigin } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

const { issuer, resource, client_id, client_secret, scope, keyFile, dpop } = client;
const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
const timeoutSeconds = 10;
const maxBytes = 1_048_576;
const renewEarlySeconds = 60;
const assertionSeconds = 60;
const newKeyFile = "keys/client.jwk";

/** RFC 6749 §5.1. */
interface TokenResponse {
  access_token: string;
  token_type: string;
  expires_in?: number;
  scope?: string;
}

/** What to try, by the code of an error. */
const hints = new Map([
  ["ECONNREFUSED", "Is it running? `bun start` starts everything."],
  ["DEPTH_ZERO_SELF_SIGNED_CERT", "Start all in one directory, or set NODE_EXTRA_CA_CERTS."],
  ["invalid_client", "Check CLIENT_ID and CLIENT_SECRET, or CLIENT_KEY; its log has the reason."],
  ["invalid_scope", "Check SCOPE against the registration of the client."],
  ["insufficient_scope", "Check SCOPE: this API requires another scope."],
]);

// --- The three steps -----------------------------------------------------------------------------

/** Discovers, requests a token, calls the API; prints what came back. Throws an Error of one line. */
export async function run(): Promise<void> {
  requireOrigin("ISSUER", issuer);
  requireOrigin("API_URL", resource);
  console.error(`Requesting a token for ${client_id} from ${issuer}`);
  const token = await accessToken();
  print(token);
  const { access_token } = token;
  print({ header: jose.decodeProtectedHeader(access_token), claims: jose.decodeJwt(access_token) });
  console.error(`Calling ${resource}/identity`);
  const answer = await apiFetch(`${resource}/identity`);
  if (!answer.ok) throw await failure("The call", answer);
  print(await answer.json());
}

/** The token endpoint (RFC 8414 §3.3). */
async function discover(): Promise<string> {
  const url = `${issuer}/.well-known/openid-configuration`;
  const { issuer: named, token_endpoint } = await json(await send("Discovery", url, {}));
  const own = named === issuer && `${token_endpoint}`.startsWith(`${issuer}/`);
  if (!own) throw new Error(`Discovery failed: ${url} is not the metadata of ${issuer}.`);
  return `${token_endpoint}`;
}

async function requestToken(): Promise<TokenResponse> {
  const endpoint = await discover();
  const started = Date.now();
  const headers = new Headers(await proof("POST", endpoint));
  const body = new URLSearchParams({ grant_type: "client_credentials", scope });
  await authenticate(headers, body);
  const answer = await send("The token request", endpoint, { method: "POST", headers, body });
  if (answer.status !== 200) throw await failure("The token request", answer);
  const token = (await json(answer)) as Partial<TokenResponse>;
  const { access_token, token_type = "", expires_in = 0 } = token;
  const types = dpop ? ["dpop"] : ["bearer", "dpop"]; // RFC 9449 §5
  const usable = access_token && types.includes(`${token_type}`.toLowerCase());
  if (!usable) throw new Error(`The token request failed: no usable token from ${endpoint}.`);
  renewAt = started + 1000 * (expires_in - Math.min(renewEarlySeconds, expires_in / 2));
  return { ...token, access_token, token_type };
}

// --- What programs import ------------------------------------------------------------------------

let current: Promise<TokenResponse> | undefined;
let renewAt = 0;

/** The token that there is until shortly before it expires, then a new one, one for all who wait. */
export async function accessToken(): Promise<TokenResponse> {
  if (Date.now() >= renewAt) {
    renewAt = Infinity;
    current = requestToken();
    current.catch(() => (renewAt = 0));
  }
  return await current!;
}

/**
 * A fetch with the token, for the API's origin alone. If the API finds the token not valid, it gets
 * a new one and tries again, once and if the body can be sent again.
 */
export async function apiFetch(url: string, init: RequestInit = {}): Promise<Response> {
  if (new URL(url).origin !== resource) throw new Error(`The token is for ${resource} alone.`);
  const token = await accessToken();
  const answer = await call(url, init, token);
  const rejected = /error="invalid_token"/.test(answer.headers.get("www-authenticate") ?? "");
  if (!rejected || init.body instanceof ReadableStream) return answer;
  if (token === (await current)) renewAt = 0;
  return await call(url, init, await accessToken());
}

async function call(url: string, init: RequestInit, { token_type, access_token }: TokenResponse) {
  const headers = new Headers(init.headers);
  headers.set("authorization", `${token_type} ${access_token}`);
  for (const [name, value] of Object.entries(await proof(init.method ?? "GET", url, access_token)))
    headers.set(name, value);
  return await send("The call", url, { ...init, headers });
}

// --- Credentials ---------------------------------------------------------------------------------

const proofKey = dpop ? await jose.generateKeyPair("ES256") : undefined;

async function authenticate(headers: Headers, body: URLSearchParams): Promise<void> {
  if (!keyFile) {
    // RFC 6749 §2.3.1: both are form-encoded first.
    const credentials = [client_id, client_secret].map(encodeURIComponent).join(":");
    return headers.set("authorization", `Basic ${btoa(credentials)}`);
  }
  const jwk: jose.JWK = JSON.parse(readSetting("CLIENT_KEY"));
  const claims = { iss: client_id, sub: client_id, aud: issuer, jti: crypto.randomUUID() };
  const assertion = await new jose.SignJWT(claims)
    .setProtectedHeader({ alg: jwk.alg!, kid: jwk.kid! })
    .setIssuedAt()
    .setExpirationTime(`${assertionSeconds}s`)
    .sign(jwk);
  body.set("client_assertion_type", jwtBearer);
  body.set("client_assertion", assertion);
}

/** The field with a proof of possession for one request (RFC 9449 §4.2); empty without DPOP. */
async function proof(htm: string, htu: string, token?: string): Promise<Record<string, string>> {
  if (!proofKey) return {};
  const jwk = await jose.exportJWK(proofKey.publicKey);
  const ath = token && hash("sha256", token, "base64url");
  const claims = { htm, htu, jti: crypto.randomUUID(), ...(ath && { ath }) };
  const jwt = new jose.SignJWT(claims).setIssuedAt();
  jwt.setProtectedHeader({ alg: "ES256", typ: "dpop+jwt", jwk });
  return { dpop: await jwt.sign(proofKey.privateKey) };
}

// --- Requests and messages -----------------------------------------------------------------------

/** Sends a request. Throws an Error of one line that says what failed, where, and what to try. */
async function send(what: string, url: string, init: RequestInit): Promise<Response> {
  const signal = AbortSignal.timeout(timeoutSeconds * 1000);
  return await boundedFetch(url, { ...init, signal }, maxBytes).catch((error) => {
    const { code, message } = error;
    throw new Error(`${what} failed at ${url}: ${message}. ${hints.get(code) ?? ""}`);
  });
}

async function failure(what: string, answer: Response): Promise<Error> {
  const challenge = answer.headers.get("www-authenticate") ?? "";
  const { error = /error="([^"]*)"/.exec(challenge)?.[1], error_description } = await json(answer);
  const said = printable(`${error ?? ""} ${error_description ?? ""}`);
  return new Error(
    `${what} failed: status ${answer.status} ${said} ${hints.get(`${error}`) ?? ""}`,
  );
}

/** The members of a JSON object, none if it is something else. */
async function json(answer: Response): Promise<Record<string, unknown>> {
  const value = await answer.json().catch(() => ({}));
  return Object(value) as Record<string, unknown>;
}

/** A server's text as one short line: escaped, and cut. */
function printable(text: string): string {
  const escape = (character: string) => `\\u{${character.codePointAt(0)!.toString(16)}}`;
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, escape).slice(0, 200);
}

function print(value: unknown): void {
  console.log(JSON.stringify(value, null, 2));
}

/** Waits until both servers answer, for the few seconds that they need to start. */
async function servers(): Promise<void> {
  for (const url of [issuer, resource]) {
    for (let tries = 0; tries < 100; tries++) {
      if (await boundedFetch(`${url}/health`, {}, maxBytes).catch(() => undefined)) break;
      await Bun.sleep(100);
    }
  }
}

async function newKey() {
  const { privateKey } = await jose.generateKeyPair("ES256", { extractable: true });
  const { d, ...publicJwk } = await jose.exportJWK(privateKey);
  const kid = await jose.calculateJwkThumbprint(publicJwk);
  const jwk = { ...publicJwk, alg: "ES256", kid };
  mkdirSync("keys", { recursive: true, mode: 0o700 });
  writeFileSync(newKeyFile, JSON.stringify({ ...jwk, d }), { mode: 0o600, flag: "wx" });
  console.log(JSON.stringify(jwk));
}

if (import.meta.main) {
  if (process.argv.includes("--wait")) await servers();
  await (process.argv.includes("--new-key") ? newKey() : run()).catch(fail);
}
