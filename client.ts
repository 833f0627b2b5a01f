/**
 * The client (RFC 6749 §1.1): discovers the authorization server, asks it for an access token with
 * credentials of its own (§4.4), and calls the API with that. A program imports `accessToken`, or
 * `apiFetch`, which uses it.
 *
 * It authenticates with a secret or, if CLIENT_KEY names a file, with a key (RFC 7523). With DPOP=1
 * its tokens are bound to a key of this process (RFC 9449).
 * Run: bun run client.ts   (--wait: while the servers start; --new-key: make a key pair)
 */

import { mkdirSync, writeFileSync } from "node:fs";
import * as jose from "jose";
import { boundedFetch, client, fail, requireOrigin } from "./config.ts";

// --- Data ----------------------------------------------------------------------------------------

const { issuer, resource, client_id, client_secret, scope, keyFile, dpop } = client;
const jwtBearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"; // RFC 7523 §2.2
const maxBytes = 1_048_576;
const newKeyFile = "keys/client.jwk";

/** RFC 6749 §5.1. */
interface TokenResponse {
  access_token: string;
  token_type: string;
  expires_in?: number;
  scope?: string;
}

/** What to try, by the code of an error. */
const hints: [RegExp, string][] = [
  [/ECONNREFUSED/, "Is it running? `bun start` starts everything."],
  [/CERT|SIGNATURE/, "Start all three in one directory, or set NODE_EXTRA_CA_CERTS."],
  [/invalid_client/, "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY."],
  [/invalid_scope/, "Check SCOPE against the registration of the client."],
  [/insufficient_scope/, "Check SCOPE: the API requires another scope."],
];

// --- The three steps -----------------------------------------------------------------------------

/** Discovers, requests a token, calls the API; prints what came back. Throws one-line Errors. */
export async function run(): Promise<void> {
  requireOrigin("ISSUER", issuer);
  requireOrigin("API_URL", resource);
  console.error(`Requesting a token for ${client_id} from ${issuer}`);
  const token = await accessToken();
  console.log(JSON.stringify(token, null, 2));
  const header = jose.decodeProtectedHeader(token.access_token);
  const claims = jose.decodeJwt(token.access_token);
  console.log(JSON.stringify({ header, claims }, null, 2));
  const url = `${resource}/identity`;
  console.error(`Calling ${url}`);
  const answer = await apiFetch(url);
  if (!answer.ok) throw await refused("The call", url, answer);
  console.log(JSON.stringify(await members(answer), null, 2));
}

/** The token endpoint (RFC 8414 §3.3). */
async function discover(): Promise<string> {
  const url = `${issuer}/.well-known/openid-configuration`;
  const { issuer: named, token_endpoint } = await members(await send("Discovery", url, {}));
  const own = named === issuer && `${token_endpoint}`.startsWith(`${issuer}/`);
  if (!own) throw failure("Discovery", url, `this is not the metadata of ${issuer}`);
  return `${token_endpoint}`;
}

async function requestToken(): Promise<TokenResponse> {
  const url = await discover();
  const started = Date.now();
  const headers = new Headers();
  const body = new URLSearchParams({ grant_type: "client_credentials", scope });
  await authenticate(headers, body);
  await prove(headers, "POST", url);
  const answer = await send("The token request", url, { method: "POST", headers, body });
  if (answer.status !== 200) throw await refused("The token request", url, answer);
  const token = (await members(answer)) as unknown as TokenResponse;
  // RFC 9449 §5: a token that is not bound although that was asked for is discarded.
  const usable = `${token.token_type}`.toLowerCase() === (dpop ? "dpop" : "bearer");
  if (!usable || !token.access_token) throw failure("The token request", url, "no usable token");
  // A minute before it expires, or half-way if its life is short; without expires_in at once.
  const { expires_in = 0 } = token;
  renewAt = started + 1000 * (expires_in - Math.min(60, expires_in / 2));
  return token;
}

// --- What programs import ------------------------------------------------------------------------

let current: Promise<TokenResponse> | undefined;
let renewAt = 0;

/** The token that there is until shortly before it expires; then one new one for all who wait. */
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
  const challenge = answer.headers.get("www-authenticate") ?? "";
  const rejected = answer.status === 401 && challenge.includes('error="invalid_token"');
  if (!rejected || init.body instanceof ReadableStream) return answer;
  if (token === (await current)) renewAt = 0;
  return await call(url, init, await accessToken());
}

async function call(url: string, init: RequestInit, { token_type, access_token }: TokenResponse) {
  const headers = new Headers(init.headers);
  headers.set("authorization", `${token_type} ${access_token}`);
  await prove(headers, init.method ?? "GET", url, access_token);
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
  const jwk: jose.JWK = await Bun.file(keyFile)
    .json()
    .catch(() => {
      throw new Error(`CLIENT_KEY must name a file with a private JWK: ${keyFile}`);
    });
  const assertion = new jose.SignJWT({ jti: crypto.randomUUID() });
  assertion.setIssuer(client_id).setSubject(client_id).setAudience(issuer);
  assertion.setIssuedAt().setExpirationTime("1 minute");
  assertion.setProtectedHeader({ alg: `${jwk.alg}`, kid: `${jwk.kid}` });
  body.set("client_assertion_type", jwtBearer);
  body.set("client_assertion", await assertion.sign(jwk));
}

/** Adds a proof of possession for this request (RFC 9449 §4.2) if tokens are to be bound. */
async function prove(headers: Headers, htm: string, htu: string, token?: string): Promise<void> {
  if (!proofKey) return;
  const jwk = await jose.exportJWK(proofKey.publicKey);
  const ath = token && Bun.SHA256.hash(token, "base64url");
  const proof = new jose.SignJWT({ htm, htu, jti: crypto.randomUUID(), ...(ath && { ath }) });
  proof.setIssuedAt().setProtectedHeader({ alg: "ES256", typ: "dpop+jwt", jwk });
  headers.set("dpop", await proof.sign(proofKey.privateKey));
}

/** Makes a key pair: the private JWK goes into a file, the public one to stdout for config.ts. */
async function makeKey(): Promise<void> {
  const { privateKey } = await jose.generateKeyPair("ES256", { extractable: true });
  const { d, ...jwk } = { ...(await jose.exportJWK(privateKey)), alg: "ES256" };
  const kid = await jose.calculateJwkThumbprint(jwk);
  mkdirSync("keys", { recursive: true, mode: 0o700 });
  writeFileSync(newKeyFile, JSON.stringify({ ...jwk, kid, d }), { mode: 0o600, flag: "wx" });
  console.log(JSON.stringify({ ...jwk, kid }));
}

// --- Requests and messages -----------------------------------------------------------------------

async function send(what: string, url: string, init: RequestInit): Promise<Response> {
  const signal = AbortSignal.timeout(10_000);
  return await boundedFetch(url, { ...init, signal }, maxBytes).catch(({ message, code }) => {
    throw failure(what, url, typeof code === "string" ? code : message, code);
  });
}

/** The members of a JSON object, none if it is something else. */
async function members(answer: Response): Promise<Record<string, unknown>> {
  return Object(await answer.json().catch(() => ({}))) as Record<string, unknown>;
}

async function refused(what: string, url: string, answer: Response): Promise<Error> {
  const challenge = answer.headers.get("www-authenticate") ?? "";
  const { error, error_description = "" } = await members(answer);
  const code = error ?? /error="([^"]*)"/.exec(challenge)?.[1] ?? "";
  return failure(what, url, `${answer.status} ${code} ${error_description}`.trim(), code);
}

/** An Error of one line: what failed, where, why as printable text, and what to try. */
function failure(what: string, url: string, why: string, code?: unknown): Error {
  const escape = (character: string) => `\\u{${character.codePointAt(0)!.toString(16)}}`;
  const printable = why.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, escape).slice(0, 200);
  const hint = hints.find(([pattern]) => pattern.test(`${code}`));
  return new Error(`${what} failed at ${url}: ${printable}${hint ? ` (${hint[1]})` : ""}`);
}

/** Waits until a server answers, for the seconds that it may need to start. */
async function untilUp(url: string): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    if (await boundedFetch(url, {}, maxBytes).catch(() => undefined)) return;
    await Bun.sleep(100);
  }
}

if (import.meta.main) {
  if (process.argv.includes("--wait")) await Promise.all([issuer, resource].map(untilUp));
  await (process.argv.includes("--new-key") ? makeKey() : run()).catch(fail);
}
