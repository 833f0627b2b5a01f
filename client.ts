/**
 * The client (RFC 6749 §1.1): discovers the authorization server, asks it for an access token with
 * credentials of its own (§4.4), and calls the API with that. A program imports `TokenSource`, whose
 * `fetch` brings a token along.
 *
 * It authenticates with a secret or, if CLIENT_KEY names a file, with a key (RFC 7523). With DPOP=1
 * its tokens are bound to a key of this process (RFC 9449).
 * Run: bun run client.ts   (--wait: while the servers start; --new-key: make a key pair)
 */

import { mkdirSync, writeFileSync } from "node:fs";
import * as jose from "jose";
import * as config from "./config.ts";

type Settings = config.ClientSettings;
type Members = Record<string, unknown>;

/** RFC 6749 §5.1, as far as a call needs it; `expires_in` in seconds. */
export type TokenResponse = Members & { access_token: string; token_type: string };

// --- Discover, request, call ---------------------------------------------------------------------

/** Discovers, requests a token, calls the API; prints what came back. Rejects with StepErrors. */
export async function run(settings: Settings = config.client): Promise<void> {
  const tokens = new TokenSource(settings);
  console.error(`Requesting a token for ${settings.client_id} from ${settings.issuer}`);
  const response = await tokens.accessToken();
  print(response);
  printDecoded(response.access_token);

  const url = `${settings.resource}/identity`;
  console.error(`Calling ${url}`);
  print(await membersOf(settings, "The call", url, await tokens.fetch(url)));
}

/** Shows what a JWT says. To its client a token is opaque (RFC 6749 §1.4), so this is a courtesy. */
function printDecoded(access_token: string): void {
  try {
    const header = jose.decodeProtectedHeader(access_token);
    print({ header, claims: jose.decodeJwt(access_token) });
  } catch {
    console.error("The token is opaque: it is no JWT, so it cannot be shown decoded.");
  }
}

/** The token endpoint, from the issuer's metadata (RFC 8414 §3). */
async function discoverTokenEndpoint(settings: Settings): Promise<string> {
  const { issuer } = settings;
  const url = config.metadataUrl(issuer);
  const answer = await sendBounded(settings, "Discovery", url, {});
  const metadata = await membersOf(settings, "Discovery", url, answer);
  const { token_endpoint } = metadata;
  // RFC 8414 §3.3: "MUST be identical to the issuer identifier value".
  if (metadata["issuer"] !== issuer)
    throw wrongMember("Discovery", url, metadata, "issuer", issuer);
  // The secret goes there, so it must be the issuer's own.
  const origin = config.isText(token_endpoint) ? URL.parse(token_endpoint)?.origin : undefined;
  if (config.isText(token_endpoint) && origin === new URL(issuer).origin) return token_endpoint;
  throw wrongMember("Discovery", url, metadata, "token_endpoint", "a URL of the issuer");
}

// --- What programs import ------------------------------------------------------------------------

/** Access tokens for one API, requested when they are needed. */
export class TokenSource {
  readonly #settings: Settings;
  readonly #prover: Prover | undefined;
  /** The token, and until when it is used: milliseconds since 1970. */
  #current: { response: TokenResponse; renewAt: number } | undefined;
  #requesting: Promise<TokenResponse> | undefined;

  constructor(settings: Settings = config.client) {
    this.#settings = settings;
    if (settings.dpop) this.#prover = new Prover();
  }

  /**
   * Resolves with the token response that there is until shortly before it expires; then one new
   * one is requested for all who wait. Rejects with a StepError, which is not remembered.
   */
  async accessToken(): Promise<TokenResponse> {
    if (this.#current && this.#settings.clock() < this.#current.renewAt)
      return this.#current.response;
    this.#requesting ??= this.#request().finally(() => (this.#requesting = undefined));
    return await this.#requesting;
  }

  /**
   * A fetch with the token, for the API's origin alone. If the API answers 401 `invalid_token`, it
   * renews the token and sends the request once more, unless the body can be read only once. It
   * differs from `fetch` in one thing: redirects are not followed, for the token is not for other
   * hosts. The caller's signal is the only deadline.
   */
  async fetch(input: string | URL | Request, init: RequestInit = {}): Promise<Response> {
    const url = input instanceof Request ? input.url : String(new URL(input));
    const { resource } = this.#settings;
    if (new URL(url).origin !== new URL(resource).origin)
      throw new Error(`The token is for ${resource} alone, not for ${url}.`);
    const { method, headers, body, signal } = input instanceof Request ? input : ({} as Request);
    const request = { ...(method && { method, headers, body, signal }), ...init };
    const isStream = Symbol.asyncIterator in Object(request.body);
    const used = await this.accessToken();
    const answer = await this.#call(url, request, used);
    const error = answer.status === 401 ? challengeError(answer) : "";
    if (isStream || !["invalid_token", "use_dpop_nonce"].includes(error)) return answer;
    // RFC 9449 §9: the API wants its nonce in the proof. Else the token is at an end, unless somebody
    // else has renewed it meanwhile.
    const isOver = error === "invalid_token" && this.#current?.response === used;
    if (isOver) this.#current = undefined;
    return await this.#call(url, request, await this.accessToken());
  }

  async #call(url: string, init: RequestInit, token: TokenResponse): Promise<Response> {
    const headers = new Headers(init.headers);
    headers.set("authorization", `${token.token_type} ${token.access_token}`);
    const method = (init.method ?? "GET").toUpperCase();
    await this.#prover?.prove(headers, method, url, token.access_token);
    const sending = config.directFetch(url, { ...init, headers }, this.#settings.tls);
    const answer = await sending.catch((error) => {
      throw init.signal?.aborted ? error : unanswered(this.#settings, "The call", url, error);
    });
    this.#prover?.takeNonce(url, answer);
    return answer;
  }

  /** Requests a token (RFC 6749 §4.4.2), and checks what comes back (§5.1). */
  async #request(): Promise<TokenResponse> {
    config.parseServerUrl("ISSUER", this.#settings.issuer);
    config.parseServerUrl("API_URL", this.#settings.resource);
    const url = await discoverTokenEndpoint(this.#settings);
    const started = this.#settings.clock();
    let answer = await this.#post(url);
    // RFC 9449 §8: the server wants its nonce in the proof, and has sent it along.
    const wantsNonce =
      answer.status === 400 && (await answer.clone().text()).includes("use_dpop_nonce");
    if (wantsNonce) answer = await this.#post(url);
    const members = await membersOf(this.#settings, "The token request", url, answer);
    const response = checkedResponse(url, members, this.#settings.dpop);
    // A minute before it expires, or half-way if its life is short; without expires_in at once.
    const lifetime = Number(response["expires_in"] ?? 0);
    const renewAt = started + 1000 * (lifetime - Math.min(60, lifetime / 2));
    this.#current = { response, renewAt };
    return response;
  }

  async #post(url: string): Promise<Response> {
    const headers = new Headers();
    const grant = { grant_type: "client_credentials", scope: this.#settings.scope };
    const body = new URLSearchParams(grant);
    await authenticate(this.#settings, headers, body);
    await this.#prover?.prove(headers, "POST", url);
    const init = { method: "POST", headers, body };
    const answer = await sendBounded(this.#settings, "The token request", url, init);
    this.#prover?.takeNonce(url, answer);
    return answer;
  }
}

/** Throws a StepError for a token response that cannot be used, and says which member is wrong. */
function checkedResponse(url: string, members: Members, dpop: boolean): TokenResponse {
  const { access_token, token_type, expires_in = 1 } = members;
  // RFC 9449 §5: a token that is not bound although that was asked for is discarded.
  const wantedType = dpop ? "DPoP" : "Bearer";
  const wrong = (name: string, wanted: string) =>
    wrongMember("The token request", url, members, name, wanted);
  if (!config.isText(token_type) || token_type.toLowerCase() !== wantedType.toLowerCase())
    throw wrong("token_type", wantedType);
  if (!config.isText(access_token) || !/^[\w.~+/-]+=*$/.test(access_token))
    throw wrong("access_token", "text as RFC 6750 §2.1 has it");
  if (typeof expires_in !== "number" || expires_in <= 0)
    throw wrong("expires_in", "a number of seconds over 0");
  return { ...members, access_token, token_type };
}

// --- Client authentication and proof of possession -----------------------------------------------

/** Adds the client's credentials to a token request. */
async function authenticate(settings: Settings, headers: Headers, body: URLSearchParams) {
  const { client_id, client_secret, keyFile } = settings;
  if (keyFile) {
    // RFC 7523 §2.2
    body.set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
    body.set("client_assertion", await clientAssertion(settings, keyFile));
  } else {
    // RFC 6749 §2.3.1 and Appendix B: both are form-encoded first, here by the platform's encoder.
    const encode = (text: string) => new URLSearchParams([["", text]]).toString().slice(1);
    headers.set("authorization", `Basic ${btoa(`${encode(client_id)}:${encode(client_secret)}`)}`);
  }
}

/** RFC 7523 §3: an assertion for the issuer alone, good for one minute. */
async function clientAssertion({ client_id, issuer }: Settings, file: string): Promise<string> {
  try {
    const jwk: { alg: string; kid: string } = await Bun.file(file).json();
    const claims = { iss: client_id, sub: client_id, aud: issuer, jti: crypto.randomUUID() };
    const header = { alg: jwk.alg, kid: jwk.kid, typ: "client-authentication+jwt" };
    const jwt = new jose.SignJWT(claims).setIssuedAt().setExpirationTime("1 minute");
    return await jwt.setProtectedHeader(header).sign(jwk);
  } catch {
    throw new Error(`CLIENT_KEY must name a file with a private JWK and its alg, not ${file}.`);
  }
}

/** Proves with every request that this process has the key that its tokens are bound to. */
class Prover {
  readonly #keyPair = jose.generateKeyPair("ES256");
  /** The latest nonce of each origin (RFC 9449 §8.2: any answer may bring a new one). */
  readonly #nonces = new Map<string, string>();

  /** Adds a proof for this request (RFC 9449 §4.2), with the token's hash where one is sent. */
  async prove(headers: Headers, htm: string, url: string, access_token?: string): Promise<void> {
    const { publicKey, privateKey } = await this.#keyPair;
    const [htu] = url.split(/[?#]/);
    const nonce = this.#nonces.get(new URL(url).origin);
    const ath = access_token && config.sha256(access_token, "base64url");
    // JSON leaves out what is undefined.
    const claims = { htm, htu, jti: crypto.randomUUID(), nonce, ath };
    const jwk = await jose.exportJWK(publicKey);
    const header = { alg: "ES256", typ: "dpop+jwt", jwk };
    const proof = new jose.SignJWT(claims).setIssuedAt().setProtectedHeader(header);
    headers.set("dpop", await proof.sign(privateKey));
  }

  takeNonce(url: string, { headers }: Response): void {
    const nonce = headers.get("dpop-nonce");
    if (nonce) this.#nonces.set(new URL(url).origin, nonce);
  }
}

// --- Requests and messages -----------------------------------------------------------------------

/** A step that failed: one line that says which, where, why, and what to try. No secret, no token. */
export class StepError extends Error {
  readonly code: string;

  /** `why` may hold text of a server. */
  constructor(step: string, url: string, why: string, code: string, hint: string) {
    const [place, reason] = [url, why].map((text) => printable(text).slice(0, 200));
    super(`${step} failed at ${place}: ${reason} (${hint})`);
    this.code = code;
  }
}

/** What to try, by the code of an error. */
function hintFor(code: string, url: string, { dpop, proxyVariable }: Settings): string {
  const isLocal = config.isLoopback(new URL(url));
  if (/CERT|SIGN|OpenSocket/.test(code))
    return isLocal
      ? "Start all programs in one directory, or with the same TLS_CERT."
      : "Set NODE_EXTRA_CA_CERTS if the certificate is of a private authority.";
  if (/^[A-Z][A-Za-z]+$/.test(code) && proxyVariable && !isLocal)
    return `${proxyVariable} is set: check that proxy, or name the host in NO_PROXY.`;
  if (code === "ECONNREFUSED") return "Is it running? `bun start` starts everything.";
  if (code === "invalid_client") return "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY.";
  if (code === "invalid_scope") return "Check SCOPE against the registration of the client.";
  if (code === "insufficient_scope") return "Check SCOPE: the API requires another scope.";
  if (code === "invalid_dpop_proof" && dpop) return "Check the clocks of both machines.";
  if (code === "invalid_dpop_proof") return "Set DPOP=1 if the client is registered for that.";
  return "Check ISSUER and API_URL, and the log of the server.";
}

/** A member of an answer that is not what it must be. The token itself is never shown. */
function wrongMember(step: string, url: string, members: Members, name: string, wanted: string) {
  const value = name === "access_token" ? "not usable" : JSON.stringify(members[name]);
  const why = `${name} is ${value}, and must be ${wanted}`;
  return new StepError(step, url, why, name, "Check ISSUER and DPOP, and what the server sends.");
}

/** Sends a request whose answer must be short, and come within 10 s. Rejects with a StepError. */
async function sendBounded(settings: Settings, step: string, url: string, init: RequestInit) {
  const signal = AbortSignal.timeout(10_000);
  return await config.boundedFetch(url, { ...init, signal }, settings.tls).catch((error) => {
    throw unanswered(settings, step, url, error);
  });
}

function unanswered(settings: Settings, step: string, url: string, error: unknown): StepError {
  const { code } = error as { code?: unknown };
  const name = config.isText(code) ? code : "";
  return new StepError(
    step,
    url,
    name || config.reasonOf(error),
    name,
    hintFor(name, url, settings),
  );
}

/** The members of a 200 (RFC 6749 §5.1, RFC 8414 §3.2). Rejects with the error of any other. */
async function membersOf(settings: Settings, step: string, url: string, answer: Response) {
  const document: unknown = await answer.json().catch(() => undefined);
  const members = Object(document) as Members;
  if (answer.status === 200 && document === members) return members;
  const { error, error_description } = members;
  const code = config.isText(error) ? error : challengeError(answer);
  const description = config.isText(error_description) ? error_description : "";
  const why = answer.status === 200 ? "The answer is no JSON object" : `${code} ${description}`;
  throw new StepError(
    step,
    url,
    `${answer.status} ${why}`.trim(),
    code,
    hintFor(code, url, settings),
  );
}

/** The `error` in the challenge of a 401 or 403 (RFC 6750 §3), or "". */
function challengeError({ headers }: Response): string {
  return /error="([^"]*)"/.exec(headers.get("www-authenticate") ?? "")?.[1] ?? "";
}

/** What is not ASCII, as JSON escapes it: no text of a server plays tricks on a terminal. */
function printable(text: string): string {
  const escapeUnit = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return text.replace(/[^ -~]/g, escapeUnit);
}

function print(value: unknown): void {
  console.log(JSON.stringify(value, null, 2).split("\n").map(printable).join("\n"));
}

// --- Start ---------------------------------------------------------------------------------------

/** Waits until a server takes connections, for the some 20 s that it may need to start. */
async function untilUp(url: string): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    const problem = await sendBounded(config.client, "Waiting", url, {}).catch((error) => error);
    if (!(problem instanceof StepError) || problem.code !== "ECONNREFUSED") return;
    await Bun.sleep(100);
  }
}

/** Makes a key pair: the private JWK goes into a file, the public one to stdout for config.ts. */
async function makeKey(): Promise<void> {
  const { privateKey, publicKey } = await jose.generateKeyPair("ES256", { extractable: true });
  const jwk = await jose.exportJWK(privateKey);
  const ids = { alg: "ES256", kid: await jose.calculateJwkThumbprint(jwk) };
  mkdirSync("keys", { recursive: true, mode: 0o700 });
  writeFileSync("keys/client.jwk", JSON.stringify({ ...jwk, ...ids }), { mode: 0o600, flag: "wx" });
  console.log(JSON.stringify({ ...(await jose.exportJWK(publicKey)), ...ids }));
}

if (import.meta.main) {
  config.requireBunVersion();
  const { issuer, resource } = config.client;
  if (process.argv.includes("--wait")) await Promise.all([issuer, resource].map(untilUp));
  await (process.argv.includes("--new-key") ? makeKey() : run()).catch(config.fail);
}
