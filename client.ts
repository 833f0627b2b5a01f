/**
 * The client (RFC 6749 §1.1): discovers the authorization server, asks it for an access token with
 * credentials of its own (§4.4), and calls the API with that. A program imports `TokenSource`,
 * whose `fetch` brings a token along.
 *
 * It authenticates with a secret or, if CLIENT_KEY names a file, with a key (RFC 7523). With DPOP=1
 * its tokens are bound to a key of this process (RFC 9449).
 * Run: bun run client.ts   (--wait: while the servers start; --new-key: make a key pair)
 */

import { mkdirSync, writeFileSync } from "node:fs";
import * as jose from "jose";
import * as config from "./config.ts";

type Settings = config.ClientSettings;

/** RFC 6749 §5.1, as far as a call needs it; `expires_in` in seconds. */
export type TokenResponse = config.Members & { access_token: string; token_type: string };

// --- Discover, request, call ---------------------------------------------------------------------

/** Discovers, requests a token, calls the API; prints what came back. Rejects if a step fails. */
async function run(settings: Settings): Promise<void> {
  const tokens = new TokenSource(settings);
  console.error(`Requesting a token for ${settings.client_id} from ${settings.issuer}`);
  const response = await tokens.accessToken();
  print(response);
  printDecoded(response.access_token);

  const url = `${config.withoutSlash(settings.resource)}/identity`;
  console.error(`Calling ${url}`);
  print(await new Step(settings, "The call", url).membersOf(await tokens.fetch(url)));
}

/**
 * Shows what a JWT says. To its client a token is opaque (RFC 6749 §1.4), so this is a courtesy.
 */
function printDecoded(access_token: string): void {
  try {
    const header = jose.decodeProtectedHeader(access_token);
    print({ header, claims: jose.decodeJwt(access_token) });
  } catch {
    console.error("The token is opaque: it is no JWT, so it cannot be shown decoded.");
  }
}

/** The token endpoint, from the issuer's metadata (OpenID Connect Discovery §4, RFC 8414 §2). */
async function discoverTokenEndpoint(settings: Settings): Promise<string> {
  const { issuer } = settings;
  const step = new Step(settings, "Discovery", config.metadataUrl(issuer));
  const metadata = await step.ask({});
  // RFC 8414 §3.3: the issuer that the metadata names must be the one that was asked.
  step.require(metadata["issuer"] === issuer, metadata, "issuer", issuer);
  const { token_endpoint: endpoint } = metadata;
  // Choice: the secret goes there, so it must be on the origin of the issuer.
  const { origin } = new URL(issuer);
  const url = config.isText(endpoint) ? URL.parse(endpoint)?.href : undefined;
  // RFC 6749 §3.2: the endpoint has no fragment.
  const isAtIssuer = url?.startsWith(`${origin}/`) && !url.includes("#");
  step.require(isAtIssuer, metadata, "token_endpoint", `a URL of ${origin}`);
  return String(endpoint);
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
   * Resolves with the current token response, until shortly before it expires. After that, one
   * request serves everybody who waits. Rejects with a StepError, which is not remembered.
   */
  async accessToken(): Promise<TokenResponse> {
    const current = this.#current;
    if (current && this.#settings.clock() < current.renewAt) return current.response;
    this.#requesting ??= this.#request().finally(() => (this.#requesting = undefined));
    return await this.#requesting;
  }

  /**
   * A fetch with the token, for the API's origin alone. It sends the request once more if the API
   * answers 401 `invalid_token`, with a new token, or `use_dpop_nonce`, with that nonce; but not if
   * the body can be read only once. Unlike `fetch` it follows no redirect, for the token is not for
   * other hosts, and takes of a Request only its method, header fields, body and signal. The signal
   * ends the call, but not a request for a token that it waits for, which has 10 s for each step.
   */
  async fetch(input: string | URL | Request, init: RequestInit = {}): Promise<Response> {
    const url = input instanceof Request ? input.url : String(new URL(input));
    const { resource } = this.#settings;
    if (new URL(url).origin !== new URL(resource).origin)
      throw new Error(`The token is for ${resource} alone, not for ${url}.`);
    const { method, headers, body, signal } = input instanceof Request ? input : init;
    // What `init` has goes before what the Request has.
    const request = { method, headers, body, signal, ...init } as BunFetchRequestInit;
    const used = await this.accessToken();
    const answer = await this.#call(url, request, used);
    const error = answer.status === 401 ? challengeError(answer) : "";
    // A token that is refused is given up, unless somebody has renewed it meanwhile.
    const isCurrent = this.#current?.response === used;
    if (error === "invalid_token" && isCurrent) this.#current = undefined;
    // RFC 9449 §9: an API may want its nonce in the proof.
    const isReadOnce = Symbol.asyncIterator in Object(request.body);
    if (isReadOnce || !["invalid_token", "use_dpop_nonce"].includes(error)) return answer;
    await answer.body?.cancel().catch(() => {}); // it may have broken off
    return await this.#call(url, request, await this.accessToken());
  }

  async #call(url: string, init: BunFetchRequestInit, token: TokenResponse): Promise<Response> {
    const headers = new Headers(init.headers);
    headers.set("authorization", `${token.token_type} ${token.access_token}`);
    const { method = "GET" } = init;
    await this.#prover?.prove(headers, method.toUpperCase(), url, token.access_token);
    const step = new Step(this.#settings, "The call", url);
    const sending = config.fetchUnredirected(url, { ...init, headers }, this.#settings.tls);
    const answer = await sending.catch((error) => {
      if (init.signal?.aborted) throw error;
      return step.unanswered(error);
    });
    this.#prover?.takeNonce(url, answer);
    return answer;
  }

  /** Requests a token (RFC 6749 §4.4.2), and checks what comes back (§5.1). */
  async #request(): Promise<TokenResponse> {
    const { issuer, resource, clock, dpop } = this.#settings;
    config.parseServerUrl("ISSUER", issuer, "other");
    config.parseServerUrl("API_URL", resource, "other");
    const endpoint = await discoverTokenEndpoint(this.#settings);
    const step = new Step(this.#settings, "The token request", endpoint);
    const started = clock();
    const members = await this.#post(step).catch((error: unknown) => {
      // RFC 9449 §8: the server wants its nonce in the proof, and has sent it along.
      const wantsNonce = error instanceof StepError && error.code === "use_dpop_nonce";
      return wantsNonce ? this.#post(step) : Promise.reject(error);
    });
    const response = checkedResponse(step, members, dpop);
    // A minute before it expires, or half-way if its life is short; without expires_in at once.
    const lifetime = Number(members["expires_in"] ?? 0);
    const renewAt = started + 1000 * (lifetime - Math.min(60, lifetime / 2));
    this.#current = { response, renewAt };
    return response;
  }

  async #post(step: Step): Promise<config.Members> {
    const headers = new Headers();
    const grant = { grant_type: "client_credentials", scope: this.#settings.scope };
    const body = new URLSearchParams(grant);
    await authenticate(this.#settings, headers, body);
    await this.#prover?.prove(headers, "POST", step.url);
    return await step.ask({ method: "POST", headers, body }, this.#prover);
  }
}

/** What a token response must have to be used. */
function checkedResponse(step: Step, members: config.Members, dpop: boolean): TokenResponse {
  const { access_token, token_type, expires_in } = members;
  // RFC 9449 §5: a token that is not bound although that was asked for is discarded.
  const type = dpop ? "DPoP" : "Bearer";
  const isType = config.isText(token_type) && token_type.toLowerCase() === type.toLowerCase();
  step.require(isType, members, "token_type", type);
  const isToken = config.isText(access_token) && /^[\w.~+/-]+=*$/.test(access_token);
  step.require(isToken, members, "access_token", "text as RFC 6750 §2.1 has it");
  const isLifetime = Number.isFinite(expires_in) && Number(expires_in) > 0;
  if (expires_in !== undefined) step.require(isLifetime, members, "expires_in", "a number over 0");
  return members as TokenResponse;
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

/**
 * A step that failed: one line that says which, where, why, and what to try. No secret, no token.
 */
export class StepError extends Error {
  readonly code: string;

  /** `why` may hold text of a server. */
  constructor(step: Step, why: string, code = "") {
    const [place, reason] = [step.url, why].map((text) => printable(text).slice(0, 200));
    super(`${step.name} failed at ${place}: ${reason} (${hintFor(step, code)})`);
    this.code = code;
  }
}

const hints = new Map([
  ["ECONNREFUSED", "Is it running? `bun start` starts everything."],
  ["token_type", "Check DPOP, and what the server sends."],
  ["invalid_client", "Check CLIENT_ID and CLIENT_SECRET or CLIENT_KEY."],
  ["invalid_scope", "Check SCOPE against the registration of the client."],
  ["insufficient_scope", "Check SCOPE: the API requires another scope."],
  ["invalid_dpop_proof", "Set DPOP=1 if the client is registered for it, and check the clocks."],
]);

/** What to try, by the code of an error. */
function hintFor({ url, settings: { proxyVariable } }: Step, code: string): string {
  const isLocal = config.isLoopback(new URL(url));
  // FailedToOpenSocket comes when the certificate to trust cannot be read.
  const isTls = /CERT|SIGN|OpenSocket/.test(code);
  if (isTls && isLocal) return "Start all programs in one directory, or with the same TLS_CERT.";
  if (isTls) return "Set NODE_EXTRA_CA_CERTS if the certificate is of a private authority.";
  // Bun's codes of failed connections begin with a capital.
  if (proxyVariable && !isLocal && /^[A-Z]/.test(code))
    return `${proxyVariable} is set: check that proxy, or name the host in NO_PROXY.`;
  return hints.get(code) ?? "Check ISSUER and API_URL, and the log of the server.";
}

/** A request to a server: what it is for, and where it goes. Its errors say both. */
class Step {
  readonly settings: Settings;
  readonly name: string;
  readonly url: string;

  constructor(settings: Settings, name: string, url: string) {
    this.settings = settings;
    this.name = name;
    this.url = url;
  }

  /** Sends a request whose answer must be short, and come within 10 s. */
  async ask(init: RequestInit, prover?: Prover): Promise<config.Members> {
    const bounded = { ...init, signal: AbortSignal.timeout(10_000) };
    const sending = config.boundedFetch(this.url, bounded, this.settings.tls);
    const answer = await sending.catch((error) => this.unanswered(error));
    prover?.takeNonce(this.url, answer);
    return await this.membersOf(answer);
  }

  /** Throws the error of a request that got no answer. */
  unanswered(error: unknown): never {
    const { code } = error as { code?: unknown };
    const text = config.isText(code) ? code : "";
    throw new StepError(this, text || config.reasonOf(error), text);
  }

  /**
   * The JSON object or list of a 200 (RFC 6749 §5.1, RFC 8414 §3.2). Rejects with the error of any
   * other answer.
   */
  async membersOf(answer: Response): Promise<config.Members> {
    const { status } = answer;
    const document: unknown = await answer.json().catch(() => undefined);
    const members = Object(document) as config.Members; // wraps what is no object or list
    if (status === 200 && document === members) return members;
    if (status === 200) throw new StepError(this, "200 The answer is no JSON object");
    const { error, error_description: description } = members;
    const code = config.isText(error) ? error : challengeError(answer);
    const why = `${status} ${code} ${config.isText(description) ? description : ""}`;
    throw new StepError(this, why.trim(), code);
  }

  /** Throws unless a member of an answer is right. The token itself is never shown. */
  require(isRight: unknown, members: config.Members, name: string, wanted: string): void {
    if (isRight) return;
    const shown = name === "access_token" ? "not usable" : JSON.stringify(members[name]);
    throw new StepError(this, `${name} is ${shown}, and must be ${wanted}`, name);
  }
}

/** The `error` in the challenge of a 401 or 403 (RFC 6750 §3), or "". */
function challengeError({ headers }: Response): string {
  const pattern = /[\s,]error\s*=\s*"?([^\s",]*)/i; // RFC 9110 §11.2: quoted or not
  return pattern.exec(headers.get("www-authenticate") ?? "")?.[1] ?? "";
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

/** Waits until a server takes connections, for the 20 s or so that it may need to start. */
async function untilUp(url: string): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    const step = new Step(config.client, "Waiting", url);
    const problem = await step.ask({}).catch((error: unknown) => error);
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
  await (process.argv.includes("--new-key") ? makeKey() : run(config.client)).catch(config.fail);
}
