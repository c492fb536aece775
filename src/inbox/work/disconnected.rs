//! A handler whose connection to the database ends under it: by a timeout of the server, by an
//! administrator, or by what the handler does.

use std::mem;

use tokio_postgres::Client;

use super::{
    Attempt, Database, Duration, FIRST_PAUSE, Handler, HandlerError, InHand, Message, Received,
    Result, Worker, begin, postgres_error, receive, rolled_back,
};

impl<H: Handler> Worker<H> {
    /// Tries it again with a new connection; an error if there is none. The first time is not held
    /// against the message, because it may be chance.
    pub(super) async fn disconnected(
        &self,
        database: &Database,
        client: &mut Client,
        item: &mut InHand,
        error: HandlerError,
    ) -> Result<Attempt> {
        *client = database.connect().await?;
        if !mem::replace(&mut item.disconnected, true) {
            self.counters.retries.increment(1);
            tracing::warn!(
                consumer = self.options.consumer,
                message_id = item.message.id,
                key = item.message.key,
                error = error.to_string(),
                "the connection to the database ended under the handler; it is called again"
            );
            return Ok(Attempt::Again(FIRST_PAUSE.mul_f64(fastrand::f64())));
        }
        if !self.is_unhandled(client, &item.message).await? {
            return Ok(Attempt::Again(Duration::ZERO));
        }
        self.failed(client, item, error).await
    }

    /// Its commit may have been done before the connection ended.
    async fn is_unhandled(&self, client: &mut Client, message: &Message) -> Result<bool> {
        let tx = begin(client, None).await.map_err(postgres_error)?;
        let received = receive(&tx, &self.options.consumer, message).await?;
        rolled_back(tx.rollback().await);
        Ok(matches!(received, Received::Handle))
    }
}
