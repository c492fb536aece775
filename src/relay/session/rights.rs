//! What the relay's role may do with the relay's own tables. A right that is lacking would fail in
//! the middle of the work, and row-level security would hide rows without a word: a parked row that
//! is not seen holds its key no longer. So it is asked for at `init`, `check` and every start, and
//! while a session runs. Our connections also set `row_security` off: then the server refuses a
//! statement whose rows a policy would filter.

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::source::SourceKind;
use crate::verdict::Verdict;

/// What a role lacks on one object of the schema `watership`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    /// The role that lacks it.
    pub role: String,
    /// Whether that is the applications' role.
    pub app: bool,
    /// The object, as GRANT names it.
    pub object: String,
    /// The privileges, as GRANT names them.
    pub privileges: Vec<String>,
    /// Whether row-level security stands in the way.
    pub hidden: bool,
    /// Whether the relay cannot run without it.
    pub vital: bool,
    /// Whether the object does not exist.
    pub missing: bool,
}

impl Lack {
    /// Whether the relay's role may not even enter the schema: then it lacks all the rest, too.
    pub fn is_everything(&self) -> bool {
        !self.app && self.object == "SCHEMA watership"
    }

    /// What is lacking, and what to do.
    pub fn told(&self) -> (String, String) {
        let Self { role, object, .. } = self;
        let quoted = postgres_protocol::escape::escape_identifier(role);
        let mut what = Vec::new();
        let mut hints = Vec::new();
        if self.missing {
            what.push(format!("table {object} does not exist"));
            hints.push(format!(
                "run `watership init` if a newer version added it; if {object} was dropped, \
                 restore it from a backup, or create it with the statements in sql/"
            ));
        }
        if self.hidden {
            what.push(match self.app {
                true => format!("no row-level security policy on {object} lets role {role} insert"),
                false => format!(
                    "row-level security of {object} applies to role {role:?} and can hide rows \
                     from it"
                ),
            });
            let policy = format!(
                ", or CREATE POLICY emit ON {object} FOR INSERT TO {role} WITH CHECK (true)"
            );
            hints.push(match self.app {
                true => format!("ALTER TABLE {object} DISABLE ROW LEVEL SECURITY{policy}"),
                false => format!(
                    "ALTER TABLE {object} DISABLE ROW LEVEL SECURITY, or, as a superuser: \
                     ALTER ROLE {quoted} BYPASSRLS"
                ),
            });
        }
        if !self.privileges.is_empty() {
            let list = self.privileges.join(", ");
            what.push(format!("role {role:?} lacks {list} on {object}"));
            let group = if self.app { "watership_app" } else { "watership_relay" };
            hints.push(format!(
                "as the owner of the schema: GRANT {list} ON {object} TO {group} (of which \
                 {role} must be a member)"
            ));
        }
        (what.join("; "), hints.join("; "))
    }
}

/// What `role` (absent: the role of the connection) of a relay of this kind lacks, and the
/// applications' role.
///
/// # Errors
/// What the server says.
pub async fn lacking(client: &Client, role: Option<&str>, kind: SourceKind) -> Result<Vec<Lack>> {
    const SQL: &str = include_str!("../../../sql/query/rights.sql");
    let rows = unnamed::query(client, SQL, &[&role, &kind.name()]).await.map_err(postgres_error)?;
    let lack = |row: &tokio_postgres::Row| {
        Ok(Lack {
            role: row.try_get(0)?,
            app: row.try_get(1)?,
            object: row.try_get(2)?,
            privileges: row.try_get(3)?,
            hidden: row.try_get(4)?,
            vital: row.try_get(5)?,
            missing: row.try_get(6)?,
        })
    };
    rows.iter().map(|row| lack(row).map_err(postgres_error)).collect()
}

/// Refuses a role that cannot do the relay's work.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with everything that is lacking, and the statements; a verdict
/// where a table is missing.
pub fn verify(lacks: &[Lack]) -> Result<()> {
    if let Some(Lack { role, .. }) = lacks.iter().find(|lack| lack.is_everything()) {
        let quoted = postgres_protocol::escape::escape_identifier(role);
        return Err(Error::refused(format!("role {role:?} lacks the rights of watership_relay"))
            .hint(format!(
                "run `watership init`, or as a superuser: GRANT watership_relay TO {quoted}"
            )));
    }
    let told: Vec<_> = lacks.iter().filter(|lack| lack.vital).map(Lack::told).collect();
    if told.is_empty() {
        return Ok(());
    }
    let (what, hints): (Vec<_>, Vec<_>) = told.into_iter().unzip();
    let what = what.join("; ");
    let is_missing = lacks.iter().any(|lack| lack.vital && lack.missing);
    let error = match is_missing {
        true => Error::named(Verdict::SchemaUnknown, what),
        false => Error::refused(what),
    };
    Err(error.hint(hints.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_told_with_the_statements_and_only_what_is_vital_refuses() {
        let lack = |object: &str, privileges: &[&str], hidden, vital| Lack {
            role: "shop".into(),
            app: false,
            object: object.into(),
            privileges: privileges.iter().map(|p| (*p).to_owned()).collect(),
            hidden,
            vital,
            missing: false,
        };
        let lacks = [
            lack("watership.parked", &["INSERT", "SELECT"], true, true),
            lack("watership.resync", &["INSERT"], false, false),
        ];
        let error = verify(&lacks).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Refused);
        let text = error.text_with_hint();
        assert!(text.contains("role \"shop\" lacks INSERT, SELECT on watership.parked"), "{text}");
        assert!(text.contains("ALTER TABLE watership.parked DISABLE ROW LEVEL SECURITY"), "{text}");
        assert!(text.contains("ALTER ROLE \"shop\" BYPASSRLS"), "{text}");
        assert!(!text.contains("resync"), "{text}");
        assert!(verify(&lacks[1..]).is_ok());
    }
}
