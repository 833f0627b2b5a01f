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

/** RFC 6749 §5.1, as far as a call needs it. */
type TokenResponse = Record<"access_token" | "token_type", string>;

/** What to try, by the code of an error. */
const hints: [RegExp, string][] = [
  [/ECONNREFUSED/, "Is it running? `bun start` starts everything."],
  [/CERT|SIGN|OpenSocket/, "Start all in one directory, or set TLS_CERT or NODE_EXTRA_CA_CERTS."],
  [/invalid_client/, "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY."],
  [/invalid_scope/, "Check SCOPE against the registration of the client."],
  [/invalid_dpop_proof/, "Set DPOP=1 if the client is registered for bound tokens."],
  [/insufficient_scope/, "Check SCOPE: the API requires another scope."],
];

// --- Discover, request, call ---------------------------------------------------------------------

/** Discovers, requests a token, calls the API; prints what came back. Throws one-line Errors. */
export async function run(): Promise<void> {
  console.error(`Requesting a token for ${client_id} from ${issuer}`);
  const response = await accessToken();
  print(response);
  try {
    const header = jose.decodeProtectedHeader(response.access_token);
    print({ header, claims: jose.decodeJwt(response.access_token) });
  } catch {
    throw failure("Decoding the token", issuer, "it is no JWT");
  }
  const url = `${resource}/identity`;
  console.error(`Calling ${url}`);
  print(await membersOf("The call", url, await apiFetch(url)));
}

/** The token endpoint (RFC 8414 §3.3). */
async function discover(): Promise<string> {
  const url = `${issuer}/.well-known/openid-configuration`;
  const answer = await send("Discovery", url, {});
  const { issuer: named, token_endpoint } = await membersOf("Discovery", url, answer);
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
  const response = await membersOf("The token request", url, answer);
  // RFC 9449 §5: a token that is not bound although that was asked for is discarded.
  const isAsked = `${response["token_type"]}`.toLowerCase() === (dpop ? "dpop" : "bearer");
  const { access_token } = response;
  const isToken = typeof access_token === "string" && /^[\w.~+/-]+=*$/.test(access_token);
  if (!isAsked || !isToken) throw failure("The token request", url, "no usable token");
  // A minute before it expires, or half-way if its life is short; without expires_in at once.
  const lifetime = Number(response["expires_in"]) || 0;
  renewAt = started + 1000 * (lifetime - Math.min(60, lifetime / 2));
  return response as unknown as TokenResponse;
}

// --- What programs import ------------------------------------------------------------------------

let current: Promise<TokenResponse> | undefined;
let renewAt = 0; // in milliseconds, as Date.now()

/** The token that there is until shortly before it expires; then one new one for all who wait. */
export function accessToken(): Promise<TokenResponse> {
  if (current && Date.now() < renewAt) return current;
  renewAt = Infinity; // while the request is under way all wait for it
  current = requestToken();
  current.catch(() => (renewAt = 0));
  return current;
}

/**
 * A fetch with the token, for the API's origin alone. If the API finds the token not valid, it gets
 * a new one and tries again, once and if the body can be sent again.
 */
export async function apiFetch(url: string, init: RequestInit = {}): Promise<Response> {
  if (new URL(url).origin !== resource) throw new Error(`The token is for ${resource} alone.`);
  const used = accessToken();
  const answer = await call(url, init, await used);
  const challenge = answer.headers.get("www-authenticate") ?? "";
  const rejected = answer.status === 401 && challenge.includes('error="invalid_token"');
  if (!rejected) return answer;
  if (used === current) renewAt = 0; // else somebody renewed it meanwhile
  if (Symbol.asyncIterator in Object(init.body)) return answer; // a stream is used up
  return await call(url, init, await accessToken());
}

async function call(url: string, init: RequestInit, { token_type, access_token }: TokenResponse) {
  const headers = new Headers(init.headers);
  headers.set("authorization", `${token_type} ${access_token}`);
  await prove(headers, (init.method ?? "GET").toUpperCase(), url, access_token);
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
  const assertion = await clientAssertion(keyFile).catch(() => {
    throw new Error(`CLIENT_KEY must name a file with a private JWK and its alg, not ${keyFile}`);
  });
  body.set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
  body.set("client_assertion", assertion);
}

/** RFC 7523 §2.2 and §3, for the issuer alone. */
async function clientAssertion(file: string): Promise<string> {
  const jwk: { alg: string; kid: string } = await Bun.file(file).json();
  const claims = { iss: client_id, sub: client_id, aud: issuer, jti: crypto.randomUUID() };
  const assertion = new jose.SignJWT(claims).setIssuedAt().setExpirationTime("1 minute");
  return await assertion.setProtectedHeader({ alg: jwk.alg, kid: jwk.kid }).sign(jwk);
}

/** Adds a proof of possession for this request (RFC 9449 §4.2) if tokens are to be bound. */
async function prove(headers: Headers, htm: string, url: string, access_token?: string) {
  if (!proofKey) return;
  const [htu] = url.split(/[?#]/);
  const jwk = await jose.exportJWK(proofKey.publicKey);
  const ath = access_token && Bun.SHA256.hash(access_token, "base64url");
  const proof = new jose.SignJWT({ htm, htu, jti: crypto.randomUUID(), ...(ath && { ath }) });
  proof.setIssuedAt().setProtectedHeader({ alg: "ES256", typ: "dpop+jwt", jwk });
  headers.set("dpop", await proof.sign(proofKey.privateKey));
}

// --- Requests and messages -----------------------------------------------------------------------

async function send(what: string, url: string, init: RequestInit): Promise<Response> {
  // Here, for a program that imports this file has no start of its own.
  requireOrigin("ISSUER", issuer);
  requireOrigin("API_URL", resource);
  const signal = AbortSignal.any([AbortSignal.timeout(10_000), init.signal ?? []].flat());
  return await boundedFetch(url, { ...init, signal }, 1_048_576).catch(({ message, code }) => {
    throw failure(what, url, typeof code === "string" ? code : message, code);
  });
}

/** The members of a 200 (RFC 6749 §5.1, RFC 8414 §3.2). Throws the error of any other answer. */
async function membersOf(what: string, url: string, answer: Response) {
  const members = Object(await answer.json().catch(() => {})) as Record<string, unknown>;
  if (answer.status === 200) return members;
  const challenge = answer.headers.get("www-authenticate") ?? "";
  const { error, error_description = "" } = members;
  const code = error ?? /error="([^"]*)"/.exec(challenge)?.[1] ?? "";
  throw failure(what, url, `${answer.status} ${code} ${error_description}`.trim(), code);
}

/** An Error of one line: what failed, where, why as printable text, and what to try. */
function failure(what: string, url: string, why: string, code?: unknown): Error {
  const hint = hints.find(([pattern]) => pattern.test(`${code}`));
  const [where, reason] = [url, why].map((text) => printable(text).slice(0, 200));
  const advice = hint?.[1] ?? "Check ISSUER and API_URL, and the log of the server.";
  return new Error(`${what} failed at ${where}: ${reason} (${advice})`);
}

/** What is not ASCII, as JSON escapes it: no text of a server plays tricks on a terminal. */
const printable = (text: string) => text.replace(/[^ -~]/g, escapeUnit);
const escapeUnit = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;

const print = (value: unknown) =>
  console.log(JSON.stringify(value, null, 2).split("\n").map(printable).join("\n"));

// --- Start ---------------------------------------------------------------------------------------

/** Waits until a server answers, for the some 20 s that it may need to start. */
export async function untilUp(url: string): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    const problem = await send("Waiting", url, {}).then(() => "", String);
    if (!problem.includes("ECONNREFUSED")) return;
    await Bun.sleep(100);
  }
}

/** Makes a key pair: the private JWK goes into a file, the public one to stdout for config.ts. */
export async function makeKey(): Promise<void> {
  const { privateKey, publicKey } = await jose.generateKeyPair("ES256", { extractable: true });
  const jwk = await jose.exportJWK(privateKey);
  const ids = { alg: "ES256", kid: await jose.calculateJwkThumbprint(jwk) };
  mkdirSync("keys", { recursive: true, mode: 0o700 });
  writeFileSync("keys/client.jwk", JSON.stringify({ ...jwk, ...ids }), { mode: 0o600, flag: "wx" });
  console.log(JSON.stringify({ ...(await jose.exportJWK(publicKey)), ...ids }));
}

if (import.meta.main) {
  if (process.argv.includes("--wait")) await Promise.all([issuer, resource].map(untilUp));
  await (process.argv.includes("--new-key") ? makeKey() : run()).catch(fail);
}
