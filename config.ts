/**
 * What the three parties are told: addresses, scopes, registrations, lifetimes. First the data, one
 * literal per party; then the few lines that all would otherwise repeat: where to listen, whom to
 * trust, how to fetch and stop, the log. On three machines each party has a copy of its own.
 */

import { existsSync, mkdirSync, promises, readFileSync, rmSync, writeFileSync } from "node:fs";
import { getCACertificates } from "node:tls";
import type { JWK } from "jose";

// --- Data ----------------------------------------------------------------------------------------

/** A client that is registered: RFC 7591 §2, RFC 9449 §5.2, and names of our own. */
export interface ClientRegistration {
  client_id: string;
  /** SHA-256 in base64, several while a secret is changed; `expires_at` in seconds since 1970. */
  client_secrets?: { sha256: string; expires_at?: number }[];
  /** Public keys, for `private_key_jwt`. */
  jwks?: { keys: JWK[] };
  grant_types: string[];
  scope: string;
  access_token_lifetime_seconds: number;
  dpop_bound_access_tokens?: boolean;
  /** Extra claims for this client's tokens. */
  claims?: Record<string, unknown>;
}

const { env } = process;
const issuer = env["ISSUER"] || "https://localhost:5001";
const resource = env["API_URL"] || "https://localhost:6001";

/**
 * How soon a change of the keys is known: to all instances, to caches, and to the APIs; and how
 * long an API waits before it fetches them again for a token of an unknown key.
 */
const keyTimes = { pollSeconds: 10, maxAgeSeconds: 60, refreshSeconds: 300, coolDownSeconds: 5 };

/** Signature algorithms accepted from others, asymmetric ones only. */
const acceptedAlgorithms = `ES256 ES384 ES512 RS256 RS384 RS512 PS256 PS384 PS512 EdDSA Ed25519
  ML-DSA-44 ML-DSA-65 ML-DSA-87`.split(/\s+/);

export const authorizationServer = {
  issuer,
  /** Each scope belongs to one API, whose identifier becomes `aud`. */
  scopes: [{ scope: "api1", description: "My API", resource }],
  clients: [
    {
      client_id: "client",
      client_secrets: [{ sha256: "K7gNU3sdo+OL0wNhqoVWhr3g6s1xYv72ol/pe/Unols=" }], // "secret"
      grant_types: ["client_credentials"],
      scope: "api1",
      access_token_lifetime_seconds: 3600,
    },
  ] satisfies ClientRegistration[] as ClientRegistration[],
  acceptedAlgorithms,
  signingKeys: {
    /** The first one signs; the keys of all are published. */
    algorithms: ["ES256"],
    rotationSeconds: 90 * 86_400,
    /** How long a key stays published after it signed last. */
    retentionSeconds: 14 * 86_400,
    ...keyTimes,
  },
  databaseUrl: env["DATABASE_URL"] || "sqlite://keys/keys.db",
  keyEncryptionSecret: env["KEY_ENCRYPTION_SECRET"] || "",
};

export const resourceServer = {
  resource,
  resource_name: "My API",
  issuer,
  acceptedAlgorithms,
  ...keyTimes,
};

export const client = {
  issuer,
  resource,
  client_id: env["CLIENT_ID"] || "client",
  client_secret: env["CLIENT_SECRET"] || "secret",
  scope: env["SCOPE"] || "api1",
  /** A file with a private JWK: the client authenticates with it instead of the secret. */
  keyFile: env["CLIENT_KEY"],
  /** Binds the tokens to a key of this process (RFC 9449). */
  dpop: !["", "0"].includes(env["DPOP"] ?? ""),
};

// --- Listening and trust -------------------------------------------------------------------------

/** The setting's origin. Throws for what is not a bare origin, and for http beyond this machine. */
export function requireOrigin(setting: string, value: string): URL {
  const url = URL.parse(value);
  const safe = url?.protocol === "https:" || (url?.protocol === "http:" && isLoopback(url));
  if (safe && url.origin === value) return url;
  throw new Error(`${setting} must be a bare https origin (http on loopback only), not ${value}`);
}

export const isLoopback = (url: URL) => /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);

/** Options for Bun.serve: at `origin`, or in plain http at ISSUER_LISTEN or API_LISTEN. */
export async function listenOptions(name: "ISSUER" | "API", origin: URL) {
  const bind = env[`${name}_LISTEN`] ?? "";
  const url = bind ? URL.parse(`http://${bind}`) : origin;
  if (!url || !/^([^/?#@\\]+:\d+)?$/.test(bind)) throw new Error(`${name}_LISTEN: use host:port`);
  // A loopback issuer takes weak secrets, and plain http is for this machine or its proxy.
  if (isLoopback(origin) && !isLoopback(url)) throw new Error(`${name}_LISTEN: use 127.0.0.1`);
  // A URL drops a port that is the default.
  const port = Number(url.port || (url.protocol === "https:" ? 443 : 80));
  const options = { hostname: url.hostname, port, reusePort: env["REUSE_PORT"] === "1" };
  if (url.protocol === "http:") return options;
  if (env["TLS_CERT"] || isLoopback(origin)) return { ...options, tls: await certificate() };
  throw new Error(`${origin.origin} needs TLS_CERT and TLS_KEY, or ${name}_LISTEN behind a proxy`);
}

/** Key and certificate in PEM: TLS_KEY and TLS_CERT, or one for localhost, made at first use. */
async function certificate(): Promise<{ key: string; cert: string }> {
  if (env["TLS_CERT"]) return { cert: await fileText("TLS_CERT"), key: await fileText("TLS_KEY") };
  const file = "keys/localhost.pem";
  if (!existsSync(file)) {
    mkdirSync("keys", { recursive: true, mode: 0o700 });
    const draft = `${file}.${crypto.randomUUID()}`;
    writeFileSync(draft, "", { mode: 0o600 });
    const openssl = Bun.which("openssl");
    const made = openssl && Bun.spawnSync([openssl, ...selfSigned, draft, "-out", draft]).success;
    // link() never overwrites: the three programs may start at the same instant.
    if (made) await promises.link(draft, file).catch(() => {});
    rmSync(draft);
    if (!made) throw new Error(`openssl ${openssl ? "failed" : "is missing"}: ${remedies}`);
  }
  const pem = readFileSync(file, "utf8");
  return { key: pem, cert: pem };
}

const remedies = "install it, set TLS_CERT and TLS_KEY, or use http on a loopback host";
const selfSigned = `req -x509 -days 3650 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj
  /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 -keyout`.split(/\s+/);

/** The text of the file that an environment variable names. Throws an Error that names both. */
async function fileText(variable: string): Promise<string> {
  return await promises.readFile(env[variable] ?? "", "utf8").catch(({ message }: Error) => {
    throw new Error(`${variable} must name a readable file: ${message}`);
  });
}

/**
 * Fetches without following redirects. On a loopback host the certificate in use here is trusted
 * as well. Throws also for an answer of more than `maxBytes`.
 */
export async function boundedFetch(url: string, init: RequestInit, maxBytes: number) {
  const isLocal = url.startsWith("https:") && isLoopback(new URL(url));
  const tls = isLocal ? { ca: [(await certificate()).cert, ...getCACertificates()] } : {};
  // Unpacking would go past the bound before the first chunk is seen.
  const response = await fetch(url, { ...init, tls, redirect: "manual", decompress: false });
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength;
    if (bytes > maxBytes) throw new Error(`the answer is longer than ${maxBytes} bytes`);
    chunks.push(chunk);
  }
  return new Response(bytes ? Buffer.concat(chunks) : null, response);
}

// --- Start, stop, log ----------------------------------------------------------------------------

/** Ends the program: one line on stderr, exit code 1. */
export function fail({ message, code = "" }: Error & { code?: string }): never {
  const hint = code.startsWith("ERR_OSSL") ? "TLS_CERT and TLS_KEY must be one pair in PEM: " : "";
  console.error(`error: ${hint}${message.replaceAll(/\s+/g, " ")}`);
  process.exit(1);
}

/** The shared header fields of answers, which close the connection while the server stops. */
export const lifecycle = { stopping: false, answers: [] as Headers[] };

/** Stops gracefully on SIGTERM or SIGINT, at once on a second one. */
export function stopOnSignal(server: Bun.Server<undefined>, close = async () => {}): void {
  const stop = async () => {
    if (lifecycle.stopping) process.exit(1);
    lifecycle.stopping = true;
    for (const fields of lifecycle.answers) fields.set("connection", "close");
    await Bun.sleep(500); // answers carry `Connection: close`, so that callers come back elsewhere
    await Promise.race([server.stop(), Bun.sleep(5_000)]);
    await close();
    for (let tries = 0; timer && tries < 20; tries++) await Bun.sleep(50);
    process.exit(0);
  };
  process.on("SIGTERM", stop).on("SIGINT", stop);
}

let pending = "";
let dropped = 0;
let timer: Timer | undefined;
process.stdout.on("error", () => {}); // a closed stdout ends no server

/** Writes a line of JSON to stdout within 50 ms. The caller must bound request data in it. */
export function log(event: string, details: Record<string, unknown>): void {
  if (env["LOG"] === "off") return;
  const entry = { time: new Date().toISOString(), event, ...details, ...(dropped && { dropped }) };
  // What JSON leaves as it is, but ends a line or moves a cursor somewhere.
  const line = `${JSON.stringify(entry).replace(/[\x7f-\x9f\u2000-\u206f]/g, "?")}\n`;
  const full = pending.length + line.length > 1_048_576;
  if (!full) pending += line;
  dropped = full ? dropped + 1 : 0;
  timer ??= setTimeout(writeLog, 50);
}

async function writeLog(): Promise<void> {
  const text = pending;
  await new Promise((done) => process.stdout.write(text, done));
  pending = pending.slice(text.length);
  timer = pending ? setTimeout(writeLog, 50) : undefined;
}
