//! The server, the slot, the publication and the checkpoint row, as `relay/check` compares them: at
//! every start, and every few seconds while a session runs.

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::pg::publication::{Publication, read_publication};
use crate::pg::slot::{ServerFacts, SlotState, read_slot, server_facts};
use crate::position::Lsn;
use crate::relay::Options;
use crate::relay::check::lost::Agreed;
use crate::relay::check::position::{self, Start};
use crate::relay::checkpoint::own::LastKnown;
use crate::relay::checkpoint::{self, Checkpoint};
use crate::source::SourceKind;
use crate::verdict::Verdict;

/// All of it, as it was read.
pub struct StartFacts {
    row: Checkpoint,
    server: ServerFacts,
    slot: Option<SlotState>,
    agreed: Option<Agreed>,
    publication: Option<Publication>,
}

/// Reads all of it. The slot comes first and the server last: what is read later may have moved on,
/// and slot ≤ checkpoint ≤ server must still hold.
///
/// # Errors
/// The server's, or a verdict when there is no checkpoint.
pub async fn read(client: &Client, options: &Options) -> Result<StartFacts> {
    let name = &options.name;
    let slot = read_slot(client, &options.slot).await?;
    let row = checkpoint::read(client, name).await?.ok_or_else(|| checkpoint::no_row(name))?;
    checkpoint::is_of(&row, name, SourceKind::Wal)?;
    if row.slot != options.slot {
        let (stored, asked) = (&row.slot, &options.slot);
        let text = format!("the checkpoint of {name:?} belongs to slot {stored:?}, not {asked:?}");
        return Err(Error::named(Verdict::OtherSlot, text)
            .hint("set source.slot back, or give the relay another name and run init"));
    }
    let agreed = checkpoint::read_agreed(client, name).await?;
    let publication = read_publication(client, &options.publication).await?;
    let server = server_facts(client).await?;
    Ok(StartFacts { row, server, slot, agreed, publication })
}

impl StartFacts {
    /// Compares it; `history` as in [`position::verify`].
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify(&self, options: &Options, history: &[(u32, Lsn)]) -> Result<Start> {
        let start = self.verify_position(history)?;
        self.verify_publication(options)?;
        Ok(start)
    }

    /// Compares the row with what this process last knew of it; `mark` was read before the row.
    /// On a standby, another cluster or another timeline the row is another one's, and
    /// [`StartFacts::verify`] says so.
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify_own(&self, mark: Option<LastKnown>) -> Result<()> {
        let Self { row, server, .. } = self;
        let here = server.system_identifier == row.system_id && !self.is_elsewhere();
        match mark {
            Some(mark) if here && !server.in_recovery => mark.verify(row),
            Some(_) | None => Ok(()),
        }
    }

    /// Everything that is in the way.
    pub fn doubts(&self, options: &Options, history: &[(u32, Lsn)]) -> Vec<Error> {
        let position = self.verify_position(history).err();
        position.into_iter().chain(self.verify_publication(options).err()).collect()
    }

    fn verify_position(&self, history: &[(u32, Lsn)]) -> Result<Start> {
        position::verify(&self.row, &self.server, self.slot.as_ref(), history)
    }

    /// Compares only the publication.
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify_publication(&self, options: &Options) -> Result<()> {
        let Self { row, server, agreed, publication, .. } = self;
        let (end, name, wanted) = (server.wal_lsn, &options.publication, options.wanted());
        let agreed = agreed.as_ref().map(|agreed| &agreed.publication);
        let (found, held) = (publication.as_ref(), &options.held);
        position::verify_publication(row, end, name, agreed, found, &wanted, held)
    }

    /// The checkpoint, the slot, and the server.
    pub fn position(&self) -> (&Checkpoint, Option<&SlotState>, &ServerFacts) {
        (&self.row, self.slot.as_ref(), &self.server)
    }

    /// The publication.
    pub fn publication(&self) -> Option<&Publication> {
        self.publication.as_ref()
    }

    /// The publication as it was agreed to last.
    pub fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// The server.
    pub fn into_server(self) -> ServerFacts {
        self.server
    }

    /// The server is on another timeline than the checkpoint.
    pub fn is_elsewhere(&self) -> bool {
        self.server.timeline != self.row.timeline
    }
}
