export { Inbox } from './inbox.js';
export { Message, parseMessage, type Json } from './message.js';
export { Permanent, type Handler, type InboxOptions, type Labels, type Level } from './options.js';
export { claim, claimMany, emit, forget, park, receive, type Event, type Outcome, type Queryable }
  from './sql.js';
