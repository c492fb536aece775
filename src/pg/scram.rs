//! The client's side of SCRAM-SHA-256, with and without channel binding.
//!
//! Our own, because the crate that has it refuses more than 100,000 iterations, and hardened
//! servers ask for several times as many (`scram_iterations`, Postgres 16 and later).
//!
//! <https://www.rfc-editor.org/rfc/rfc5802>, <https://www.rfc-editor.org/rfc/rfc7677>

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use ring::hmac::{self, HMAC_SHA256};
use ring::pbkdf2::{self, PBKDF2_HMAC_SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};

use crate::error::{Error, Result};
use crate::secret::Secret;

/// Iterations that are done for a server, at most: it need not prove anything before it asks, and
/// each costs time. A million take a second or two.
const ITERATIONS_MAX: u32 = 1_000_000;
/// More of them are done on another thread, because the broker is served by this one.
const ITERATIONS_HERE: u32 = 50_000;
const NONCE_BYTES: usize = 18;

/// What binds the exchange to the TLS session.
pub(super) enum ScramBinding {
    /// We cannot bind.
    Impossible,
    /// We could, and the server did not offer it.
    NotOffered,
    /// The hash of the server's certificate.
    EndPoint(Vec<u8>),
}

impl ScramBinding {
    fn header(&self) -> &'static str {
        match self {
            ScramBinding::Impossible => "n,,",
            ScramBinding::NotOffered => "y,,",
            ScramBinding::EndPoint(_) => "p=tls-server-end-point,,",
        }
    }

    /// The header and the hash, in base64.
    fn encoded(&self) -> String {
        let mut bytes = self.header().as_bytes().to_vec();
        if let ScramBinding::EndPoint(hash) = self {
            bytes.extend_from_slice(hash);
        }
        STANDARD.encode(bytes)
    }
}

/// One exchange.
pub(super) struct Scram {
    password: Secret,
    binding: ScramBinding,
    nonce: String,
    /// What the server has to send to prove that it knows the password.
    server: Option<(hmac::Key, String)>,
}

impl Scram {
    pub(super) fn new(password: &Secret, binding: ScramBinding) -> Result<Self> {
        let mut nonce = [0; NONCE_BYTES];
        SystemRandom::new().fill(&mut nonce).map_err(|_| Error::internal("no random numbers"))?;
        Ok(Self::with_nonce(password, binding, STANDARD.encode(nonce)))
    }

    fn with_nonce(password: &Secret, binding: ScramBinding, nonce: String) -> Self {
        let prepared = stringprep::saslprep(password.expose());
        // As libpq and the server do: what cannot be prepared is taken as it is.
        let prepared = prepared.map_or_else(|_| password.expose().to_owned(), |text| text.into());
        Self { password: Secret::new(prepared), binding, nonce, server: None }
    }

    /// What is sent first. The server takes the user from the start-up packet.
    pub(super) fn first(&self) -> String {
        format!("{}n=,r={}", self.binding.header(), self.nonce)
    }

    /// The answer to the server's first message: the proof that we know the password.
    ///
    /// # Errors
    /// [`crate::error::Kind::Refused`] for what the protocol does not allow, and for a server that
    /// asks for too many iterations.
    pub(super) async fn answer(&mut self, message: &[u8]) -> Result<String> {
        let message = std::str::from_utf8(message).map_err(|_| broken("is not UTF-8"))?;
        let mut parts = message.split(',');
        let mut part = |name: &str| {
            parts.next().and_then(|part| part.strip_prefix(name)).ok_or(broken("has another form"))
        };
        let (nonce, salt, iterations) = (part("r=")?, part("s=")?, part("i=")?);
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(broken("answers another client"));
        }
        let salt = STANDARD.decode(salt).map_err(|_| broken("has a salt that is not base64"))?;
        let iterations: NonZeroU32 = iterations.parse().map_err(|_| broken("has no iterations"))?;
        let salted = self.salted(salt, iterations).await?;
        let salted = hmac::Key::new(HMAC_SHA256, &salted);

        let without_proof = format!("c={},r={nonce}", self.binding.encoded());
        let signed = format!("n=,r={},{message},{without_proof}", self.nonce);
        let client_key = hmac::sign(&salted, b"Client Key");
        let stored_key = digest(&SHA256, client_key.as_ref());
        let signature =
            hmac::sign(&hmac::Key::new(HMAC_SHA256, stored_key.as_ref()), signed.as_bytes());
        let proof = client_key.as_ref().iter().zip(signature.as_ref());
        let proof: Vec<u8> = proof.map(|(key, signature)| key ^ signature).collect();
        let server_key = hmac::sign(&salted, b"Server Key");
        self.server = Some((hmac::Key::new(HMAC_SHA256, server_key.as_ref()), signed));
        Ok(format!("{without_proof},p={}", STANDARD.encode(proof)))
    }

    async fn salted(&self, salt: Vec<u8>, count: NonZeroU32) -> Result<[u8; SHA256_OUTPUT_LEN]> {
        if count.get() > ITERATIONS_MAX {
            return Err(Error::refused(format!(
                "the server asks for {count} SCRAM iterations; at most {ITERATIONS_MAX} are done"
            ))
            .hint("lower scram_iterations on the server, then set the role's password again"));
        }
        let password = self.password.clone();
        let derive = move || {
            let mut out = [0; SHA256_OUTPUT_LEN];
            let secret = password.expose().as_bytes();
            pbkdf2::derive(PBKDF2_HMAC_SHA256, count, &salt, secret, &mut out);
            out
        };
        if count.get() <= ITERATIONS_HERE {
            return Ok(derive());
        }
        let derived = tokio::task::spawn_blocking(derive).await;
        derived.map_err(|e| Error::internal("deriving the SCRAM key").caused_by(e))
    }

    /// Checks the server's last message: it knows the password too.
    ///
    /// # Errors
    /// [`crate::error::Kind::Refused`] when it does not.
    pub(super) fn finish(&mut self, message: &[u8]) -> Result<()> {
        let (key, signed) = self.server.take().ok_or(broken("comes too early"))?;
        let verifier = message.strip_prefix(b"v=").map(|text| STANDARD.decode(text));
        match verifier {
            Some(Ok(verifier)) if hmac::verify(&key, signed.as_bytes(), &verifier).is_ok() => {
                Ok(())
            }
            _ => Err(broken("does not prove that it knows the password")),
        }
    }
}

fn broken(what: &str) -> Error {
    Error::refused(format!("the SCRAM exchange with the server failed: its message {what}"))
        .hint("is this the Postgres server itself, or a proxy that answers for it?")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677; its client names a user, which ours leaves to the start-up packet,
    /// so that only what does not depend on it is compared.
    #[tokio::test]
    async fn a_server_that_knows_the_password_is_believed_and_no_other() {
        let first = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                     s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let password = Secret::new("pencil");
        let begin = || {
            Scram::with_nonce(&password, ScramBinding::Impossible, "rOprNGfwEbeRWgbNEkqO".into())
        };
        let mut scram = begin();
        assert_eq!(scram.first(), "n,,n=,r=rOprNGfwEbeRWgbNEkqO");
        let answer = scram.answer(first.as_bytes()).await.unwrap();
        assert!(
            answer.starts_with("c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=")
        );
        // The salted password and the server's signature over what was really sent.
        let salted = scram
            .salted(
                STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(),
                NonZeroU32::new(4096).unwrap(),
            )
            .await
            .unwrap();
        let server_key = hmac::sign(&hmac::Key::new(HMAC_SHA256, &salted), b"Server Key");
        assert_eq!(STANDARD.encode(server_key), "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=");
        let signed = scram.server.as_ref().unwrap().1.clone();
        let verifier = hmac::sign(&scram.server.as_ref().unwrap().0, signed.as_bytes());
        let verifier = format!("v={}", STANDARD.encode(verifier));
        scram.finish(verifier.as_bytes()).unwrap();
        for wrong in ["v=AAAA", "v=?", "e=other-error", ""] {
            let mut scram = begin();
            scram.answer(first.as_bytes()).await.unwrap();
            assert!(scram.finish(wrong.as_bytes()).is_err(), "{wrong}");
        }
        assert!(begin().finish(verifier.as_bytes()).is_err(), "it comes first");
    }

    #[tokio::test]
    async fn what_a_server_asks_is_bounded_and_has_one_form() {
        let password = Secret::new("x");
        for (message, text) in [
            ("r=nX,s=c2FsdA==,i=1000001", "asks for 1000001 SCRAM iterations"),
            ("r=nX,s=c2FsdA==,i=0", "has no iterations"),
            ("r=nX,s=c2FsdA==,i=99999999999", "has no iterations"),
            ("r=nX,s=?,i=1", "salt"),
            ("r=n,s=c2FsdA==,i=1", "another client"),
            ("r=other,s=c2FsdA==,i=1", "another client"),
            ("m=x,r=nX,s=c2FsdA==,i=1", "another form"),
            ("", "another form"),
        ] {
            let mut scram = Scram::with_nonce(&password, ScramBinding::NotOffered, "n".into());
            let error = scram.answer(message.as_bytes()).await.unwrap_err();
            assert!(error.to_string().contains(text), "{message}: {error}");
        }
        for message in ["r=nX,s=c2FsdA==,i=100001", "r=nX,s=c2FsdA==,i=1,more"] {
            let mut scram =
                Scram::with_nonce(&password, ScramBinding::EndPoint(vec![1]), "n".into());
            scram.answer(message.as_bytes()).await.unwrap();
        }
    }
}
